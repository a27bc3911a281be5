"""Write the results of ``benchmarks/gpu.py`` into ``docs/performance.md`` and its translation.

``python benchmarks/gpu_page.py`` replaces the text between the two markers of each page; ``--check`` only says whether it
would change a page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- begin: benchmarks/gpu_page.py -->", "<!-- end: benchmarks/gpu_page.py -->"
Results = dict[str, Any]
WORDS = {
    "docs/performance.md": {
        "title": "{card}, {date}",
        "facts": "torch {torch}, CUDA {cuda}, NCCL {nccl}, Python {python}, {cores} cores; a copy moves {copy:.1f} TB/s, a "
        "bf16 matrix product runs at {bf16:.0f} TFLOP/s, an fp32 one at {fp32:.0f}.",
        "head": "| measured | result |",
        "overhead": "`duoka.DataParallel` on one GPU against the bare model, {name}",
        "step": "{ratio:.3f} of its step of {ms:.1f} ms",
        "mirror": "two ranks on `{devices}`, {name}, against DDP there",
        "ratio": "{ratio:.2f} of its step of {ms:.1f} ms",
        "memory": "the first process takes {ours:,.0f} MiB of the card, DDP's {theirs:,.0f} MiB",
        "no-early": ", with nothing sent ahead, as now",
        "images": "{name}, {way}",
        "rate": "{rate:,.0f} images/s",
        "times": ", {times:.2f} times the guides' loop",
        "models": "{name}, a training step",
        "samples": "{rate:,.0f} samples/s, {times:.0f} times the CPU",
        "fault": "fault: {name}",
        "known": "the caller knows after {known:.1f} s; the next step works",
        "broken": "**the next step did not work**",
        "tests": "`tests/gpu` over {name}",
        "counts": "{passed} passed, {failed} failed, {skipped} skipped",
        "unfinished": "cut off: {counts}",
        "cut": "cut off: {finished} of {of} finished, {failed} failed, {errors} errors in set-up or clean-up",
        "note": "Note: {note}",
    },
    "docs/zh/performance.md": {
        "title": "{card}，{date}",
        "facts": "torch {torch}，CUDA {cuda}，NCCL {nccl}，Python {python}，{cores} 核；显存拷贝 {copy:.1f} TB/s，bf16 矩阵乘 "
        "{bf16:.0f} TFLOP/s，fp32 {fp32:.0f} TFLOP/s。",
        "head": "| 测量项 | 结果 |",
        "overhead": "单 GPU 上 `duoka.DataParallel` 与裸模型之比，{name}",
        "step": "裸模型一步 {ms:.1f} ms 的 {ratio:.3f}",
        "mirror": "`{devices}` 上两个 rank，{name}，与 DDP 之比",
        "ratio": "DDP 一步 {ms:.1f} ms 的 {ratio:.2f}",
        "memory": "第一个进程占用显存 {ours:,.0f} MiB，DDP 为 {theirs:,.0f} MiB",
        "no-early": "，不提前发送（现在的做法）",
        "images": "{name}，{way}",
        "rate": "{rate:,.0f} 张/秒",
        "times": "，是教程写法的 {times:.2f} 倍",
        "models": "{name}，训练一步",
        "samples": "{rate:,.0f} 样本/秒，是 CPU 的 {times:.0f} 倍",
        "fault": "故障：{name}",
        "known": "{known:.1f} 秒后调用方得知；下一步正常",
        "broken": "**下一步未能正常运行**",
        "tests": "`tests/gpu`，经 {name}",
        "counts": "通过 {passed}，失败 {failed}，跳过 {skipped}",
        "unfinished": "被中断：{counts}",
        "cut": "被中断：{of} 项中完成 {finished} 项，失败 {failed}，准备或清理阶段出错 {errors}",
        "note": "说明（英文原文）：{note}",
    },
}


Row = tuple[str, str]


def rows(record: Results, words: dict[str, str]) -> Iterator[Row]:
    """Return what was measured, and the results, of one file."""
    words = {**words, "devices": record["parts"]["facts"]["results"].get("two devices", "0,0")}
    for name, row in (
        ("tests", test_row),
        ("faults", fault_row),
        ("overhead", overhead_row),
        ("mirror", mirror_rows),
        ("images", image_rows),
        ("models", model_rows),
    ):
        for case, result in record["parts"].get(name, {}).get("results", {}).items():
            if isinstance(result, dict):
                yield from row(case, result, words)


def test_row(name: str, run: Results, words: dict[str, str]) -> Iterator[Row]:
    if "passed" in run:
        yield words["tests"].format(name=name), words["counts"].format(**run)
    elif "unfinished" in run:
        counts = {kind.lower(): count for kind, count in run["unfinished"].items() if isinstance(count, int)}
        text = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        yield words["tests"].format(name=name), words["unfinished"].format(counts=text)
    elif "finished" in run:
        text = words["cut"].format(**run, errors=run["errors in set-up or clean-up"])
        yield words["tests"].format(name=name), text


def fault_row(name: str, fault: Results, words: dict[str, str]) -> Iterator[Row]:
    works = fault.get("works again")
    known = words["known"].format(known=fault["known after, s"]) if works else words["broken"]
    yield words["fault"].format(name=name), known


def overhead_row(name: str, case: Results, words: dict[str, str]) -> Iterator[Row]:
    yield (
        words["overhead"].format(name=name),
        words["step"].format(ratio=case["ratio"], ms=case["bare model, ms"]),
    )


def mirror_rows(name: str, case: Results, words: dict[str, str]) -> Iterator[Row]:
    if "ratio to DDP" not in case:
        return
    title, peaks = (
        words["mirror"].format(name=name, devices=words["devices"]),
        case["peak memory of the first process, MiB"],
    )
    for role, more in (("duoka", ""), ("no-early", words["no-early"])):
        if role in peaks:
            ratio = words["ratio"].format(ratio=case["ratio to DDP"][role], ms=case["ms per step"]["ddp"])
            yield title + more, f"{ratio}; {words['memory'].format(ours=peaks[role], theirs=peaks['ddp'])}"


def image_rows(name: str, ways: Results, words: dict[str, str]) -> Iterator[Row]:
    for way, result in ways.items():
        if isinstance(result, dict):
            times = result.get("times the guides' loop")
            more = "" if times is None else words["times"].format(times=times)
            yield words["images"].format(name=name, way=way), words["rate"].format(rate=result["images/s"]) + more


def model_rows(name: str, case: Results, words: dict[str, str]) -> Iterator[Row]:
    if "ratio" in case:
        text = words["samples"].format(rate=case["samples/s on cuda"], times=case["ratio"])
        yield words["models"].format(name=name), text


def section(record: Results, words: dict[str, str]) -> str:
    """Return the text about one file: a heading, the facts of the machine, a table and its note."""
    facts = record["parts"]["facts"]["results"]
    rates = {
        "copy": "copy, TB/s, read and written",
        "bf16": "matrix product bf16, TFLOP/s",
        "fp32": "matrix product fp32, TFLOP/s",
    }
    values = {**facts, **{key: facts.get(name, float("nan")) for key, name in rates.items()}}
    lines = [
        f"### {words['title'].format(card=facts['card'], date=record['date'])}",
        "",
        words["facts"].format(**values),
    ]
    lines += ["", words["head"], "|---|---|", *(f"| {name} | {result} |" for name, result in rows(record, words))]
    if "note" in record:
        lines += ["", words["note"].format(note=record["note"])]
    return "\n".join(lines)


def page(path: Path, words: dict[str, str]) -> str:
    """Return a page's text with the sections of all files between its markers."""
    files = sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json"), reverse=True)
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    sections = [
        section(record, words) for record in records if "card" in record["parts"].get("facts", {}).get("results", {})
    ]
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise SystemExit(f"{path} lacks the lines {BEGIN} and {END}")
    return "\n\n".join([before + BEGIN, *sections, END]) + after


def main(*arguments: str) -> int:
    changed = []
    for name, words in WORDS.items():
        path = ROOT / name
        text = page(path, words)
        if text != path.read_text(encoding="utf-8"):
            changed.append(name)
            if "--check" not in arguments:
                path.write_text(text, encoding="utf-8")
    print("changed:", ", ".join(changed) or "nothing")
    return bool(changed) and "--check" in arguments


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
