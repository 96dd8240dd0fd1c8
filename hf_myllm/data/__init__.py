"""From text to the rows of a step: sources and readers (files and data sets to documents), tokenizer, corpus and
streaming (documents to tokens), packing (tokens to rows), sampler and mixture (step to rows); cache, remote and
pickled."""
