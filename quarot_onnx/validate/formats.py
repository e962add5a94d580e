# SPDX-License-Identifier: Apache-2.0
"""A verdict as others read it: JUnit for CI, a page for people, annotations for GitHub.

All functions take what ``validate --json`` prints. A required stage that was skipped is a failure
everywhere; any other skip stays visible as one.
"""

import html
import re
from typing import Any
from xml.etree import ElementTree

_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_MARKS = {"passed": "✓", "failed": "✗", "skipped": "–"}
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3em .8em; }
tr { border-bottom: 1px solid #8884; } td:nth-last-child(-n+3) { text-align: right; }
.passed { color: #17803d; } .failed { color: #c01c28; } .skipped { color: #777; }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd; } }"""


def as_junit(content: dict[str, Any]) -> str:
    """JUnit XML: one test suite, one test case for each stage."""
    stages = [(stage, _outcome(stage, content)) for stage in content["stages"]]
    outcomes = [outcome for _, outcome in stages]
    suite = ElementTree.Element(
        "testsuite",
        name="quarot-onnx validate",
        tests=str(len(stages)),
        failures=str(outcomes.count("failed")),
        skipped=str(outcomes.count("skipped")),
        errors="0",
        time=f"{sum(stage['seconds'] for stage, _ in stages):.3f}",
    )
    for stage, outcome in stages:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            classname=_xml(f"validate.{content['artifact']}"),
            name=stage["id"],
            time=f"{stage['seconds']:.3f}",
        )
        message = _xml(stage["detail"])
        if outcome == "failed":
            failure = ElementTree.SubElement(case, "failure", message=message, type="GateError")
            failure.text = _xml(_measured(stage))
        elif outcome == "skipped":
            ElementTree.SubElement(case, "skipped", message=message)
        else:
            ElementTree.SubElement(case, "system-out").text = _xml(
                "; ".join(part for part in (_measured(stage), stage["detail"]) if part)
            )
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def as_html(content: dict[str, Any]) -> str:
    """One self-contained page without scripts."""
    rows = []
    for stage in content["stages"]:
        outcome = _outcome(stage, content)
        cells = [
            f'<td class="{outcome}">{_MARKS[outcome]} {outcome}</td>',
            *(
                f"<td>{html.escape(text)}</td>"
                for text in (
                    stage["id"],
                    stage["detail"],
                    stage["metric"],
                    _number(stage["value"]),
                    _number(stage["threshold"]),
                    f"{stage['seconds']:.2f}",
                )
            ),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    titles = ("", "stage", "what was found", "metric", "value", "threshold", "seconds")
    head = "".join(f"<th>{title}</th>" for title in titles)
    artifact = html.escape(content["artifact"])
    verdict = "passed" if content["passed"] else "failed"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{artifact}: {verdict}</title>\n<style>{_STYLE}</style></head>\n"
        f'<body><h1>{artifact}: <span class="{verdict}">{verdict}</span></h1>\n'
        f"<table><tr>{head}</tr>\n" + "\n".join(rows) + "\n</table></body></html>\n"
    )


def as_annotations(content: dict[str, Any]) -> str:
    """GitHub's workflow commands: an error for each failure, a notice for each skip."""
    lines = []
    for stage in content["stages"]:
        outcome = _outcome(stage, content)
        if outcome != "passed":
            kind = "error" if outcome == "failed" else "notice"
            title = _command_text(f"validate {stage['id']} {stage['status']}")
            title = title.replace(":", "%3A").replace(",", "%2C")
            lines.append(f"::{kind} title={title}::{_command_text(stage['detail'])}\n")
    return "".join(lines)


def as_markdown(content: dict[str, Any]) -> str:
    """A table for GitHub's step summary."""
    verdict = "passed" if content["passed"] else "**failed**"
    lines = [
        f"### `{_cell(content['artifact'])}`: {verdict}",
        "",
        "| | stage | what was found | value | threshold |",
        "|---|---|---|---|---|",
    ]
    for stage in content["stages"]:
        cells = [
            _MARKS[_outcome(stage, content)],
            stage["id"],
            _cell(stage["detail"]),
            _number(stage["value"]),
            _number(stage["threshold"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _outcome(stage: dict[str, Any], content: dict[str, Any]) -> str:
    return "failed" if stage["id"] in content["failed"] else str(stage["status"])


def _measured(stage: dict[str, Any]) -> str:
    if stage["value"] is None:
        return ""
    limit = "" if stage["threshold"] is None else f", threshold {_number(stage['threshold'])}"
    return f"{stage['metric']}: {_number(stage['value'])}{limit}"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _xml(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold."""
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", text)


def _command_text(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _cell(text: str) -> str:
    return html.escape(" ".join(text.split())).replace("|", "\\|").replace("`", "&#96;")
