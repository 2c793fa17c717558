"""Pages from Jinja templates: one HTML file that asks the network for nothing, charts included."""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from typing import Any

from phoque.files import write_atomically
from phoque.settings.environment import cache_folder


def render_page(template: str, **context: Any) -> str:
    """Render templates/TEMPLATE.html.j2. Values are escaped; a chart is drawn where the template calls `chart`."""
    return _environment().get_template(f"{template}.html.j2").render(**context)


def format_number(value: Any) -> str:
    """Three significant digits, or a dash for None."""
    return "–" if value is None else f"{value:.3g}"


def format_interval(ends: tuple[Any, Any] | list[Any]) -> str:
    """`low to high`, three significant digits each."""
    return f"{format_number(ends[0])} to {format_number(ends[1])}"


def format_percent(value: float | None) -> str:
    """A share as percent with one decimal, or a dash for None."""
    return "–" if value is None else f"{value:.1%}"


def arrange_verdicts(
    verdicts: dict[str, dict[str, Any]], questions: dict[str, str], show: Callable[[float], str]
) -> list[dict[str, Any]]:
    """Verdicts of a report as its page shows them, in the order of `questions`; `show` writes a verdict's number."""
    return [
        {
            "name": name,
            "word": verdicts[name]["verdict"].split()[0],
            "question": question,
            "number": _describe_number(verdicts[name], show),
            **{key: verdicts[name][key] for key in ("verdict", "conditions", "why")},
        }
        for name, question in questions.items()
    ]


def _describe_number(verdict: dict[str, Any], show: Callable[[float], str]) -> str:
    """The number of a verdict with its unit and the questions behind it; empty for one that was not asked."""
    if verdict["number"] is None:
        return ""
    return f"{show(verdict['number'])} {verdict['unit']}, {verdict['n']} questions"


def conclude_verdicts(verdicts: dict[str, dict[str, Any]], order: Iterable[str]) -> str:
    """One sentence: which verdicts are yes, which no, and which are not decided."""
    words: dict[str, list[str]] = {"yes to": [], "no to": [], "not decided:": []}
    for name in order:
        words.get(f"{verdicts[name]['verdict']} to", words["not decided:"]).append(name)
    parts = [f"{word} {', '.join(names)}" for word, names in words.items() if names]
    return f"Verdicts: {'; '.join(parts)}."


def format_versions(versions: dict[str, str]) -> str:
    """`name version, name version`, in order."""
    return ", ".join(f"{name} {number}" for name, number in versions.items())


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("phoque.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["spec"] = _to_script
    context: dict[str, Any] = environment.globals
    context["vega"] = vega_bundle
    return environment


def _to_script(spec: Any) -> str:
    """JSON that may stand inside a script element."""
    from markupsafe import Markup

    return Markup(json.dumps(spec, ensure_ascii=False).replace("<", "\\u003c"))


@cache
def vega_bundle() -> str:
    """The scripts of Vega, Vega-Lite and Vega-Embed as one text, which vl-convert builds once per version."""
    import vl_convert
    from markupsafe import Markup

    build: Any = vl_convert.javascript_bundle  # its type hints require an argument that it does not need
    file = cache_folder() / f"vega-{version('vl-convert-python')}.js"
    if file.is_file():
        bundle = file.read_text(encoding="utf-8")
    else:
        bundle = build()
        with suppress(OSError):  # where the cache cannot be written, the next report builds the text again
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, bundle)
    return Markup(bundle.replace("</script", "<\\/script"))
