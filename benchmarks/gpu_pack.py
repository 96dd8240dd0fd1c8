"""Make the folders that gpu.py needs on a machine without a network, on one that has it:

    python benchmarks/gpu_pack.py [--output benchmarks/packed] [--assets ../shared/assets] [--python 3.12]

FOLDER/wheels holds the packages that an image with torch, transformers and accelerate may lack, for Linux on x86-64;
FOLDER/novels the 100 novels of the assets as GPT-2 tokens in train.bin and val.bin. Git ignores the default folder.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from hf_myllm.data import tokenizer as tokenizers
from hf_myllm.data.corpus import load_tokens
from hf_myllm.data.sources import file_source

ROOT = Path(__file__).parent.parent
PACKAGES = "datasets dill multiprocess evaluate pydantic pydantic-core annotated-types typing-inspection".split()
PACKAGES += ["typing-extensions", "torchao"]
SOURCE_PACKAGES = ["seqeval"]  # published without a wheel
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
LIMIT = 64 << 20  # bytes, so that it travels with a checkout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "packed")
    assets = Path(os.environ.get("HF_MYLLM_ASSETS", ROOT.parent / "shared" / "assets"))
    parser.add_argument("--assets", type=Path, default=assets, help="folder with the novels and GPT-2's tokenizer")
    parser.add_argument("--python", default="3.12", help="Python's version on the other machine")
    args = parser.parse_args()
    download_wheels(args.output / "wheels", args.python)
    tokenize_novels(args.assets, args.output / "novels")
    files = [path for path in args.output.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    print(f"{args.output}: {len(files)} files, {size / 2**20:.1f} MiB")
    if size > LIMIT:
        raise SystemExit(f"{args.output}: more than {LIMIT >> 20} MiB; remove what is not needed")


def download_wheels(folder, python):
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.whl"):  # two versions of a package cannot be installed together
        path.unlink()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    platforms = [flag for name in PLATFORMS for flag in ("--platform", f"{name}_x86_64")]
    options = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]
    subprocess.run([*pip, "download", *options, "--dest", str(folder), *PACKAGES], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(folder), *SOURCE_PACKAGES], check=True)


def tokenize_novels(assets, folder):
    """Write every 20th novel, from the 10th on, to val.bin and the others to train.bin, as uint16."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.load(assets / "tokenizers" / "gpt2")
    with tempfile.TemporaryDirectory() as temporary:
        with tarfile.open(assets / "corpora" / "english-novels-100.tar.xz") as archive:
            archive.extractall(temporary, filter="data")
        files = sorted(Path(temporary).rglob("*.txt"), key=lambda path: path.name)
        for file in files:  # the published figures are of text with plain line ends
            file.write_text(file.read_text(encoding="utf-8-sig"), encoding="utf-8")
        parts = {"val": files[9::20], "train": [file for index, file in enumerate(files) if index % 20 != 9]}
        for name, paths in parts.items():
            tokens, _, _ = load_tokens(file_source([str(path) for path in paths]), tokenizer)
            np.array(tokens.read(0, len(tokens)), dtype=np.uint16).tofile(folder / f"{name}.bin")
            print(f"{name}.bin: {len(paths)} novels, {len(tokens):,} tokens")


if __name__ == "__main__":
    main()
