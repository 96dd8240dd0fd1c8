"""The files of accelerate_configs/: accelerate takes each of them, and those that a CPU can start are started."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT
from families import CASES
from transformers.modeling_layers import GradientCheckpointingLayer

CONFIGS = ROOT / "accelerate_configs"
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_takes_it_and_means_what_it_says(path):
    written = yaml.safe_load(path.read_text())
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "hf_myllm.train"])
    understood, _, _ = _validate_launch_command(arguments)
    for key in ("num_processes", "num_machines", "mixed_precision", "use_cpu"):
        assert getattr(understood, key) == written[key], key
    assert understood.multi_gpu == (written["distributed_type"] == "MULTI_GPU")
    assert understood.use_fsdp == (written["distributed_type"] == "FSDP")
    if understood.use_fsdp:
        assert understood.fsdp_version == 2
    assert f"accelerate_configs/{path.name}" in path.read_text()[:1000]


def test_the_fsdp_configuration_names_the_layers_of_all_families():
    text = (CONFIGS / "fsdp2.yaml").read_text()
    for case in CASES.values():
        for model_class in case.family.tasks.values():
            small = case.make_config()
            layers = {
                type(m).__name__ for m in model_class(small).modules() if isinstance(m, GradientCheckpointingLayer)
            }
            assert len(layers) == 1
            assert layers.pop() in text


def test_the_cpu_configuration_starts_two_processes(tiny):
    launch = [
        "accelerate",
        "launch",
        "--config_file",
        str(CONFIGS / "cpu.yaml"),
        "--main_process_port",
        "0",
        "-m",
        "hf_myllm.train",
    ]
    result = subprocess.run(
        [*launch, *tiny(max_steps=4)], env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "2 x cpu" in result.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Slurm is Linux's")
def test_the_slurm_script_saves_and_queues_again(tiny, tmp_path):
    """With stand-ins for Slurm's commands: one machine of two processes."""
    place, run = tmp_path / "bin", tmp_path / "run"
    place.mkdir()
    commands = {
        "srun": '[ "$1" = --overlap ] && shift; exec "$@"',
        "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/queued',
        "pkill": f"{sys.executable} {tmp_path}/pkill.py",
    }
    for name, line in commands.items():
        (place / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (place / name).chmod(stat.S_IRWXU)
    (tmp_path / "pkill.py").write_text(  # only this test's processes
        "import os, signal\n"
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    try:\n"
        "        line = open(f'/proc/{pid}/cmdline').read()\n"
        f"        if {str(run)!r} in line and '\\0-m\\0hf_myllm.train\\0' in line:\n"
        "            os.kill(int(pid), signal.SIGUSR1)\n"
        "    except OSError:\n"
        "        pass\n"
    )
    slurm = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}
    environment = {**ENVIRONMENT, **slurm, "SLURM_JOB_NODELIST": "x", "PATH": f"{place}:{os.environ['PATH']}"}
    flags = tiny(epochs=2000, save_freq=None)
    job = subprocess.Popen(
        ["bash", str(CONFIGS / "slurm.sh"), *flags, "--save_freq", "null"], env=environment, cwd=ROOT
    )
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or '"step": 3,' not in (run / "metrics.jsonl").read_text():
        assert job.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=120)
    assert (tmp_path / "queued").read_text() == "requeue 7\n"
    (saved,) = run.glob("checkpoint-*")
    assert (saved / "trainer_state" / "complete.json").exists()
