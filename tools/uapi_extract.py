#!/usr/bin/env python3
"""Ask a C compiler for sizes, offsets and numbers in the kernel's headers, and print them as JSON.

The tests compare the declarations in wire/ with these, so that a wrong offset cannot hide.

    apt-get download linux-libc-dev && dpkg -x linux-libc-dev_*.deb ROOT
    tools/uapi_extract.py --include ROOT/usr/include --version VERSION --wanted tests/fixtures/uapi/wanted.txt \
        > tests/fixtures/uapi/linux-VERSION.json

A line of the file of what is wanted is a header, "<linux/vfio.h>", and then of what is in it "struct NAME MEMBER ..." or numbers by name.
What a header does not have yet is left out. Only the standard library is used, and a C compiler.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Wanted:
    """What of one header: structures with their members, and numbers."""

    header: str
    structs: dict[str, list[str]] = field(default_factory=dict)
    numbers: list[str] = field(default_factory=list)


def parse(text: str) -> list[Wanted]:
    """The file of what is wanted; # begins a remark."""
    found: list[Wanted] = []
    for words in (line.partition("#")[0].split() for line in text.splitlines()):
        if not words:
            continue
        if words[0].startswith("<"):
            found.append(Wanted(words[0].strip("<>")))
        elif words[0] == "struct":
            found[-1].structs[words[1]] = words[2:]
        else:
            found[-1].numbers += words
    return found


def present(wanted: Wanted, text: str) -> Wanted:
    """What of it a header's text has."""
    code = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    structs = {}
    for name, members in wanted.structs.items():
        body = re.search(rf"\bstruct\s+{name}\s*\{{(.*?)\n\}}", code, re.DOTALL)
        if body:
            structs[name] = [
                member for member in members if all(re.search(rf"\b{part}\b", body[1]) for part in member.split("."))
            ]
    numbers = [name for name in wanted.numbers if re.search(rf"\b{name}\b", code)]
    return Wanted(wanted.header, structs, numbers)


def program(wanted: list[Wanted]) -> str:
    """C that prints it all, one thing a line."""
    lines = ["#include <stddef.h>", "#include <stdio.h>", "#include <sys/ioctl.h>"]
    lines += [f"#include <{each.header}>" for each in wanted]
    lines.append("int main(void) {")
    for each in wanted:
        for name, members in each.structs.items():
            lines.append(f'printf("struct {name} %zu\\n", sizeof(struct {name}));')
            lines += [f'printf("member {member} %zu\\n", offsetof(struct {name}, {member}));' for member in members]
        lines += [f'printf("number {name} %lld\\n", (long long)({name}));' for name in each.numbers]
    return "\n".join([*lines, "return 0; }", ""])


def extract(include: Path, wanted: list[Wanted], compiler: str) -> dict[str, dict[str, object]]:
    """Structures (size and offsets in bytes) and numbers of the headers under `include`."""
    there = [present(each, (include / each.header).read_text()) for each in wanted if (include / each.header).is_file()]
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "ask.c"), Path(folder, "ask")
        source.write_text(program(there))
        subprocess.run([compiler, "-I", include, "-o", binary, source], check=True)
        answer = subprocess.run([binary], check=True, capture_output=True, text=True).stdout
    structs: dict[str, object] = {}
    numbers: dict[str, object] = {}
    offsets: dict[str, int] = {}
    for kind, name, value in (line.split() for line in answer.splitlines()):
        if kind == "struct":
            offsets = {}
            structs[name] = {"size": int(value), "members": offsets}
        elif kind == "member":
            offsets[name] = int(value)
        else:
            numbers[name] = int(value)
    return {"structs": structs, "numbers": numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--include", type=Path, default=Path("/usr/include"), help="the folder with linux/vfio.h in it")
    parser.add_argument("--version", required=True, help="version of the package, written into the output")
    parser.add_argument("--wanted", type=Path, required=True)
    arguments = parser.parse_args()
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("no C compiler: install gcc")
    found = extract(arguments.include, parse(arguments.wanted.read_text()), compiler)
    rows = {"version": json.dumps(arguments.version)}
    for part, items in found.items():
        rows[part] = "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(item)}" for name, item in items.items()) + "\n }"
    print("{\n" + ",\n".join(f" {json.dumps(name)}: {row}" for name, row in rows.items()) + "\n}")


if __name__ == "__main__":
    main()
