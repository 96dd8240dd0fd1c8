"""Changes to the program that a test makes in a process of its own; see launching.py."""


def log_compilation():
    """Log graph breaks and recompilations of torch.compile on stderr, as TORCH_LOGS does at the import of torch."""
    import torch

    torch._logging.set_logs(graph_breaks=True, recompiles=True)
