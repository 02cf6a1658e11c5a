from __future__ import annotations

import time
import tracemalloc
from typing import Any

import pytest

from pellucid.tokenizer import template_sandbox
from pellucid.tokenizer.template_sandbox import (
    Budget,
    BudgetExceededError,
    TemplateEnvironment,
    compile_template,
    render_template,
)
from tests.support.counting import Clock

SECONDS = 0.3
READINGS = 302  # of a clock that moves by a millisecond at each, until those seconds are over
PEAK_BYTES = 96 << 20


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(template_sandbox, "time", clock)
    return clock


def render(source: str, **variables: Any) -> str:
    environment = TemplateEnvironment()
    template = compile_template(environment, source)
    return render_template(environment, template, Budget(100, max_seconds=SECONDS), "", variables)


DOUBLING = "{% set ns = namespace(s='ab', l=['ab']) %}{% for i in range(200) %}BODY{% endfor %}"

ENDLESS = [
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) if j < 0 %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{{ range(100000) | map('string') | select('in', []) | list | length }}{% endfor %}",
    "{% for i in range(100000) %}{{ range(100000) | sum }}{% endfor %}",
    "{% for i in range(100000) %}{% set x = range(100000) | list | sort | unique | list %}{% endfor %}",
    "{% for i in range(100000) %}{% set x = 'zz' in 'ab' * 200000 %}{% endfor %}",
    "{% for i in range(100000) %}{% set x = ('ab' * 200000)[1:] == ('ab' * 200000)[:-1] %}{% endfor %}",
    "{% for i in range(100000) %}{% set x = ('ab' * 200000).upper().split('A') %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(200) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% continue %}{% endfor %}{% endfor %}",
]
EXPLODING = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'a' }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ 'a' * 1000 * 1000 * 1000 * 1000 }}",
    "{{ 7 ** 999999999 }}",
    "{{ 7 ** 7 ** 7 ** 7 ** 7 }}",
    "{% set ns = namespace(n=7) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ range(10 ** 12) | list }}",
    DOUBLING.replace("BODY", "{% set ns.s = ns.s ~ ns.s %}"),
    DOUBLING.replace("BODY", "{% set ns.s = ns.s + ns.s %}"),
    DOUBLING.replace("BODY", "{% set ns.s = ns.s * 2 %}"),
    DOUBLING.replace("BODY", "{% set ns.l = ns.l + ns.l %}"),
    DOUBLING.replace("BODY", "{% set ns.l = [ns.l, ns.l] %}"),
    DOUBLING.replace("BODY", "{% set ns.l = (ns.l, ns.l) %}"),
    DOUBLING.replace("BODY", "{% set ns.l = {'a': ns.l, 'b': ns.l} %}"),
    DOUBLING.replace("BODY", "{% set ns.l = dict(a=ns.l, b=ns.l) %}"),
    DOUBLING.replace("BODY", "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"),
    DOUBLING.replace("BODY", "{% set ns.s = [ns.s, ns.s] | join %}"),
    DOUBLING.replace("BODY", "{% set ns.s = ''.join([ns.s, ns.s]) %}"),
    DOUBLING.replace("BODY", "{% set ns.s = ns.s.replace('a', 'aaaa') %}"),
    DOUBLING.replace("BODY", "{% set ns.s = ns.s | replace('a', 'aaaa') %}"),
    DOUBLING.replace("BODY", "{% set ns.s = '%s%s' % (ns.s, ns.s) %}"),
    DOUBLING.replace("BODY", "{% set ns.s = '%s%s' | format(ns.s, ns.s) %}"),
    DOUBLING.replace("BODY", "{% set ns.s = '{0}{0}'.format(ns.s) %}"),
    DOUBLING.replace("BODY", "{% set ns.s = ns.l | tojson %}{% set ns.l = [ns.s, ns.s] %}"),
    "{% set s = 'a' * 500000 %}{{ s | replace('', s) }}",
    "{% set s = 'a' * 500000 %}{{ s.replace('', s) }}",
    "{% set s = 'a' * 500000 %}{{ (['a'] * 9999) | join(s) }}",
    "{% set s = '\n' * 500000 %}{{ s | indent(99999) }}",
    "{{ [1, [2]] | tojson(indent=10 ** 9) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ [1, 2] | batch(10 ** 9, 'x') | list }}",
    "{{ [1, 2] | slice(10 ** 9, 'x') | list }}",
    "{{ [1, 2] | batch(linecount=10 ** 9, fill_with='x') | list }}",
    "{{ [1, 2] | slice(slices=10 ** 9) | list }}",
    "{{ 5 | round(-10 ** 9) }}",
    "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "{{ 1.5 | round(precision=10 ** 9, method='floor') }}",
    "{{ ('9' * 4000) | int }}",
    "{{ ('&' * 1000000) | e }}",
    "{{ (('&' * 200000) | e) + '&' * 200000 }}",
    "{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}",
    "{% filter replace('a', 'b' * 500000) %}{{ 'a' * 500000 }}{% endfilter %}",
]


@pytest.mark.parametrize("source", ENDLESS)
def test_endless_templates_end(source: str, clock: Clock) -> None:
    with pytest.raises((BudgetExceededError, RecursionError)):
        render(source)
    assert clock.readings <= READINGS


@pytest.mark.parametrize("source", EXPLODING)
def test_exploding_templates_end(source: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BudgetExceededError):
            render(source)
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()


def test_without_its_clock_an_endless_template_goes_on(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    source = "{% for i in range(100) %}{% for j in range(20) %}{% endfor %}{% endfor %}"
    with pytest.raises(BudgetExceededError, match="takes longer"):
        render(source)
    monkeypatch.setattr(Budget, "charge", lambda self, work=1: None)
    render(source)


def test_without_its_measure_a_template_explodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "require", lambda self, size: None)
    assert len(render("{{ 'a' * 3000000 }}")) == 3_000_000


def test_work_counts_whatever_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_WORK", 1000)
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    with pytest.raises(BudgetExceededError, match="more work than it may"):
        render("{% for i in range(100000) %}{% endfor %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}x{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.pop() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ raise_exception.__func__ }}{{ range.__self__.filters.clear() }}",
        "{{ ''.encode().center(9) }}",
        "{{ (1).to_bytes(9, 'big') }}",
        "{{ 'a'.center(9) }}",
        "{{ 'a'.zfill(9) }}",
        "{{ 'a'.expandtabs(9) }}",
        "{{ 'a'.translate({97: 'bb'}) }}",
        "{{ '{0.__class__}'.format(1) }}{{ '{0.__class__.__base__}'.format(1) }}",
        "{{ strftime_now('%999999Y') }}",
        "{{ [[1], [2]] | sum(start=[]) }}",
        "{{ lipsum(5) }}",
        "{{ self.__init__ }}{{ self._TemplateReference__context.environment }}",
        "{% include 'x' %}",
        "{% import 'x' as x %}",
        "{% extends 'x' %}",
    ],
)
def test_what_the_sandbox_does_not_offer(source: str) -> None:
    with pytest.raises(Exception, match=r"unsafe|undefined|no loader|short pattern|adds numbers|has no attribute"):
        render(source, messages=[1])


@pytest.mark.parametrize("name", ["center", "pprint", "random", "urlize", "wordwrap", "xmlattr", "nonsense"])
def test_filters_that_are_not_offered(name: str) -> None:
    with pytest.raises(Exception, match=f"No filter named '{name}'"):
        compile_template(TemplateEnvironment(), "{{ 'a' | " + name + " }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{" + "(" * 20_000 + "1" + ")" * 20_000 + "}}",
        "{{" + "[" * 20_000 + "]" * 20_000 + "}}",
        "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
        "{{" + "-" * 50_000 + "1}}",
        "{{ 1" + " + 1" * 15_000 + " }}",
        "x" * (template_sandbox.MAX_SOURCE + 1),
    ],
)
def test_sources_too_long_or_too_deep(source: str) -> None:
    with pytest.raises(BudgetExceededError, match=r"longer than|nested too deeply"):
        compile_template(TemplateEnvironment(), source)


def test_the_input_may_be_large() -> None:
    text = "long text\n" * 500_000
    environment = TemplateEnvironment()
    template = compile_template(
        environment, "{% for m in messages %}{{ m.content | trim }}{{ '\n' + m.content }}{% endfor %}"
    )
    rendered = render_template(environment, template, Budget(len(text)), "", {"messages": [{"content": text}]})
    assert rendered == text.strip() + "\n" + text


def test_the_generation_tag_is_its_body() -> None:
    assert render("a{% generation %}{{ x }}{% endgeneration %}c", x="b") == "abc"
