"""Registers, shared memory and spills of every CUDA kernel: ``python -m benchmarks.kernels`` renews docs/kernels.md.

Compiled by NVRTC for two architectures, which needs no GPU.
"""

from __future__ import annotations

import re
from pathlib import Path

from examples.data import write_atomically
from tokopt.kernels.catalogue import CUDA_OPS
from tokopt.kernels.cuda import compile_source

PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
ARCHITECTURES = ("sm_80", "sm_90")
HEAD = (
    "| op | kernel | "
    + " | ".join(f"{arch}: registers | shared bytes | spilled" for arch in ARCHITECTURES)
    + " |"
)
REPORT = re.compile(
    r"entry function '(?P<kernel>\w+)'.*?(?P<spilled>\d+) bytes spill stores.*?Used (?P<registers>\d+) registers"
    r"(?P<rest>[^\n]*)",
    re.DOTALL,
)


def resources(op: str, arch: str) -> dict[str, tuple[int, int, int]]:
    """Registers per thread, bytes of shared memory per block and bytes spilled, by kernel, for float32."""
    _, log = compile_source(op, "float", arch, "--ptxas-options=-v")
    found = {}
    for match in REPORT.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found[match["kernel"]] = (
            int(match["registers"]),
            int(shared[1]) if shared else 0,
            int(match["spilled"]),
        )
    return found


def table() -> str:
    lines = [HEAD, "|---" * (HEAD.count("|") - 1) + "|"]
    for op in CUDA_OPS:
        columns = [resources(op, arch) for arch in ARCHITECTURES]
        for kernel in sorted(columns[0]):
            cells = [str(number) for column in columns for number in column[kernel]]
            lines.append(f"| `{op}` | `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    before, _, rest = PAGE.read_text().partition(HEAD)
    after = rest[rest.index("\n\n") :] if "\n\n" in rest else "\n"
    write_atomically(PAGE, lambda path: path.write_text(before + table() + after))


if __name__ == "__main__":
    main()
