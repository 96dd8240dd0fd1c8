"""From what a user has to what a step reads: corpus (text to tokens), packing (tokens to rows), order (step to rows),
objectives (rows to inputs and labels), tokenizer."""
