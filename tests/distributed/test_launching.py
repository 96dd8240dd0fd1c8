"""accelerate_configs/: accelerate accepts each file, and those that work on a CPU start a run."""

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
from launching import accelerate_launch, has_reached, ranks_of, wait_for
from transformers.modeling_layers import GradientCheckpointingLayer

CONFIGS = ROOT / "accelerate_configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_each_key_of_it(path):
    written = yaml.safe_load(path.read_text())
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "hf_myllm.train"])
    parsed, _, _ = _validate_launch_command(arguments)
    for key in ("num_processes", "num_machines", "mixed_precision", "use_cpu"):
        assert getattr(parsed, key) == written[key], key
    assert parsed.multi_gpu == (written["distributed_type"] == "MULTI_GPU")
    assert parsed.use_fsdp == (written["distributed_type"] == "FSDP")
    if parsed.use_fsdp:
        assert parsed.fsdp_version == 2
    assert f"accelerate_configs/{path.name}" in path.read_text()[:1000]


def test_each_family_has_one_class_of_layers_to_shard():
    for case in CASES.values():
        for model_class in case.family.tasks.values():
            modules = model_class(case.make_config()).modules()
            layers = {type(module) for module in modules if isinstance(module, GradientCheckpointingLayer)}
            assert len(layers) == 1


def test_the_cpu_configuration_starts_two_ranks_and_when_one_is_killed_the_other_prints_why(tiny, tmp_path):
    run, options = tmp_path / "run", f"--config_file {CONFIGS / 'cpu.yaml'} --main_process_port 0"
    job = accelerate_launch(options, *tiny(epochs=100, save_freq=2), "--eval_freq", "null")
    wait_for([job], has_reached(run, 3))
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    out, err = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "2 CPUs" in out
    assert "error: rank 0 of 2, in " in err
    assert "--init_from resume continues from the newest checkpoint" in err


@pytest.mark.chaos
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Slurm is Linux's")
def test_the_slurm_script_saves_and_requeues(tiny, tmp_path):
    """One machine with two ranks, and scripts in place of Slurm's commands."""
    bin_dir, run = tmp_path / "bin", tmp_path / "run"
    bin_dir.mkdir()
    commands = {
        "srun": 'while [[ "$1" = --* ]]; do shift; done; exec "$@"',
        "scontrol": f'[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> {tmp_path}/queued',
    }
    for name, line in commands.items():
        (bin_dir / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (bin_dir / name).chmod(stat.S_IRWXU)
    job_id = str(time.time_ns())
    slurm = {"SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": job_id}
    environment = {**os.environ, **slurm, "SLURM_JOB_NODELIST": "x", "PATH": f"{bin_dir}:{os.environ['PATH']}"}
    flags = tiny(epochs=2000, save_freq=None)
    job = subprocess.Popen(
        ["bash", str(CONFIGS / "slurm.sh"), *flags, "--save_freq", "null"], env=environment, cwd=ROOT
    )
    wait_for([job], has_reached(run, 3))
    sleep = [sys.executable, "-c", "import time; time.sleep(600)", "-m", "hf_myllm.train"]
    others = [  # of another job of the user on this machine, of this machine, and another program of this job
        subprocess.Popen(sleep, env=environment | {"SLURM_JOB_ID": f"{job_id}1"}),
        subprocess.Popen(sleep, env=environment | {"SLURM_JOB_ID": ""}),
        subprocess.Popen([*sleep[:3], "compile_worker"], env=environment),
    ]
    job.send_signal(signal.SIGUSR1)
    job.wait(timeout=120)
    assert [other.poll() for other in others] == [None, None, None]
    for other in others:
        other.kill()
        other.wait()
    assert (tmp_path / "queued").read_text() == f"requeue {job_id}\n"
    (checkpoint,) = run.glob("checkpoint-*")
    assert (checkpoint / "trainer_state" / "complete.json").exists()
