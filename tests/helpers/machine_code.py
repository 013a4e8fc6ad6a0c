"""What machine code uses, read with the disassembler that Triton brings."""

import importlib.util
import re
import subprocess
from collections import Counter
from pathlib import Path

INSTRUCTIONS = {
    "tensor_core": r"\b(HMMA|HGMMA|UTCHMMA)\b",
    "hgmma": r"\bHGMMA\b",
    "wgmma_waits": r"\bWARPGROUP\.DEPBAR",
    "load_matrices": r"\bLDSM\.16\.(M88|MT88)\.4\b",
    "multicast": r"\bUTMALDG\.2D\.MULTICAST\b",
    "transposed_store": r"\bSTSM\.16\.MT88\.4\b",
    "box_store": r"\bUTMASTG\.2D\b",
    "load128": r"\bLDG\.E\.128|\bLDG\.E\.\w*\.?128",
    "store128": r"\bSTG\.E\.128|\bSTG\.E\.\w*\.?128",
    "store64": r"\bSTG\.E\.64|\bSTG\.E\.\w*\.?64",
    "add": r"\bFADD\b",
    "copy_to_shared": r"\bLDGSTS\b|\bUTMALDG\b",
    # not the bits in shared memory by which Blackwell keeps account of its tensor memory
    "atomics": r"(?<![.\w])(ATOM|ATOMG|ATOMS(?!\.(OR|AND) RZ,)|RED|REDG)\.",
}


def disassembler():
    """Path of cuobjdump, or None."""
    triton = importlib.util.find_spec("triton")
    path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if triton else Path("absent")
    return path if path.exists() else None


def kernels(path, *options):
    """A dictionary for each kernel of each architecture in a cubin or a module; `options` are for cuobjdump."""
    command = [disassembler(), "-res-usage", "-sass", *options, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rows, arch = {}, None
    for part in re.split(r"^(?=arch = |[ \t]*Function )", done.stdout, flags=re.MULTILINE):
        if match := re.match(r"arch = sm_(\w+)", part):
            arch = match[1]
        elif match := re.match(r"\s*Function (\w+):", part):  # what it takes
            found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", part))
            names = {"registers": "REG", "stack": "STACK", "local": "LOCAL", "static_shared": "SHARED"}
            resources = {key: int(found[field]) for key, field in names.items()}
            rows[arch, match[1]] = {"arch": arch, "function": match[1]} | resources
        elif match := re.match(r"\s*Function : (\w+)", part):  # its code
            code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*);", part, flags=re.MULTILINE)
            rows[arch, match[1]] |= _counts(code) | {"loops": _loops(code)}
    return list(rows.values())


def _counts(code):
    """How many there are of each of INSTRUCTIONS."""
    found = dict.fromkeys(INSTRUCTIONS, 0)
    # without a predicate and with the first operand; those that are the same are looked at once
    words = [text.split() for _, text in code]
    names = [" ".join(each[1:3] if each[0].startswith("@") else each[:2]) for each in words]
    for instruction, count in Counter(names).items():
        for key, pattern in INSTRUCTIONS.items():
            found[key] += count * bool(re.search(pattern, instruction))
    return found


def _loops(code):
    """How many instructions there are from each target of a branch backwards to that branch, in their order."""
    place = {int(address, 16): i for i, (address, _) in enumerate(code)}
    found = []
    for i, (_, instruction) in enumerate(code):
        target = "BRA" in instruction and re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)", instruction)
        if target and place[int(target[1], 16)] < i:  # a branch to itself is what code ends with
            found.append(i - place[int(target[1], 16)] + 1)
    return found
