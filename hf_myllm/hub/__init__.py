"""Share a run on the Hugging Face Hub: the model card, the check by stock transformers, and the push."""

from .card import write_card
from .push import BackgroundUploads, check_target

__all__ = ["BackgroundUploads", "check_target", "write_card"]
