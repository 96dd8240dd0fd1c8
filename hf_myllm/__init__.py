"""Train and fine-tune GPT, Llama and BERT, with results that work everywhere in the Hugging Face world."""

__version__ = "0.1.0"
