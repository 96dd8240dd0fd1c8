"""The device that does the work: how to give it work without waiting for it, and what it can do and hold."""

import sys

import torch

try:
    import resource
except ImportError:  # of Windows
    resource = None

# Dense 16-bit FLOP/s of a device, by its name, from NVIDIA's data sheets: A100 (2021), H100 (2023), H200 (2024), L4 and
# L40S (2023), A10 (2021), B200 (2024), and the architecture papers of Ada (RTX 4090), Ampere (RTX 3090), Blackwell (RTX
# 5090; fp32 accumulation). The first that a name contains.
_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
}


def to_device(tensor, device):
    """A tensor of the host on the device. To one of CUDA's it is on its way while both go on, for which it must lie in
    memory that stays where it is (pinned)."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Numbers:
    """Numbers of some tensors of one device, on their way to the host while CUDA goes on with what comes next."""

    def __init__(self, *tensors):
        on_cuda = tensors[0].device.type == "cuda"
        self.tensors = [tensor.detach().to("cpu", non_blocking=on_cuda) for tensor in tensors]
        self.is_there = None
        if on_cuda:
            self.is_there = torch.cuda.Event()
            self.is_there.record()

    def read(self):
        """A list for each tensor, once the device has come that far."""
        if self.is_there is not None:
            self.is_there.synchronize()
        return [tensor.tolist() for tensor in self.tensors]


def peak_flops(accelerator):
    """16-bit floating-point operations that all devices can do in a second; 0 where that is not known."""
    if accelerator.device.type != "cuda" or accelerator.mixed_precision not in ("bf16", "fp16"):
        return 0.0
    name = torch.cuda.get_device_name(accelerator.device)
    return accelerator.num_processes * next((flops for part, flops in _FLOPS.items() if part in name), 0.0)


def peak_memory(accelerator):
    """The most bytes that this process has used so far: of its GPU, or else of the machine; None where not known."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated(accelerator.device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
