"""Planted data flows: one value from outside that is used raw, and a safe twin beside it."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from recipes.code.hosts import Host

__all__ = ["FAMILIES", "NAMES", "RESERVED", "SOURCES", "Family", "inject"]


class Family(NamedTuple):
    """The words of one weakness: what makes a value harmless, and where a raw one does harm."""

    cwe: int
    sanitizers: tuple[str, ...]
    sinks: tuple[str, ...]


FAMILIES = (
    Family(
        78,
        ("shlex.quote({x})", "shell_escape({x})"),
        ("os.system({x})", "subprocess.call({x}, shell=True)"),
    ),
    Family(
        89,
        ("escape_sql({x})", "connection.literal({x})"),
        ("cursor.execute({x})", "connection.executescript({x})"),
    ),
    Family(
        22,
        ("secure_filename({x})", "os.path.basename({x})"),
        ("open({x}).read()", "send_file({x})"),
    ),
    Family(
        79,
        ("html.escape({x})", "bleach.clean({x})"),
        ("response.write({x})", "render_template_string({x})"),
    ),
)
SOURCES = (
    'request.args.get("{k}")',
    'request.form["{k}"]',
    'request.cookies.get("{k}")',
    'os.environ.get("{k}")',
    "sys.argv[1]",
    "input()",
)
_CONSTANTS = ('"{k}"', 'settings.get("{k}")', 'settings["{k}"]', "settings.default", "str(64)")
_LOG = "log.debug({x})"
_HOPS = (
    "{x}",
    "str({x})",
    "{x}.strip()",
    "{x}.lower()",
    "{x}[:64]",
    '"{k} " + {x}',
    '"{k} %s" % {x}',
    '"{k} {{}}".format({x})',
    'f"{k} {{{x}}}"',
    '{x} or "{k}"',
)
_TESTS = ("len({x}) > 8", '{x}.startswith("{k}")', "{x}", '"{k}" in {x}')
_KEYS = "name id path user title color page query mode label city lang team sort filter report"
_LOCAL_NAMES = """
    payload field entry record raw chunk phrase snippet instruction wish fragment detail content
    selected choice param remark comment topic caption subject summary nickname address street
    country region company product category keyword locator resource location document attachment
    archive banner notice greeting headline paragraph draft answer question feedback review passage
    excerpt alias handle account profile customer visitor sender receiver message letter memo ticket
    invoice voucher coupon parcel shipment
"""
_ROOTS = """
    request os sys input settings log shlex shell_escape subprocess escape_sql connection cursor
    secure_filename open send_file html bleach response render_template_string
"""
_WORDS = tuple(_KEYS.split())
NAMES = tuple(_LOCAL_NAMES.split())
RESERVED = frozenset(_ROOTS.split())
_BRANCH_SHARE = 0.2
_MAX_HOPS = 4

Block = list[str]


def inject(host: Host, rng: random.Random, *, vulnerable: bool) -> tuple[str, int]:
    """The host's text with two parallel chains of statements in it, one raw and one safe.

    Both chains have the same kinds of statement and the same spread of lengths. The end of one
    goes to a sink of the drawn weakness, the end of the other to ``log.debug``; which one is all
    that tells a vulnerable function from its safe twin.

    Args:
        host: the function that receives the statements; it must use no name of ``RESERVED``.
        rng: the only source of chance.
        vulnerable: whether it is the raw chain that ends in the sink.

    Returns:
        The text, and the number of the weakness (CWE).
    """
    family = rng.choice(FAMILIES)
    used = host.identifiers
    names = iter(rng.sample([name for name in NAMES if name not in used], 2 * (_MAX_HOPS + 1)))
    sink = rng.choice(family.sinks)
    raw = _chain(rng, names, family, "raw", sink if vulnerable else _LOG)
    kind = rng.choice(("sanitised", "constant"))
    safe = _chain(rng, names, family, kind, _LOG if vulnerable else sink)
    return _put_between(host, _shuffled_together(rng, raw, safe), rng), family.cwe


def _chain(
    rng: random.Random, names: Iterator[str], family: Family, kind: str, end: str
) -> list[Block]:
    name = next(names)
    start = rng.choice(_CONSTANTS if kind == "constant" else SOURCES)
    blocks = [_assign(rng, name, start, "")]
    hops = rng.randint(1, _MAX_HOPS)
    cleaned = rng.randrange(hops) if kind == "sanitised" else -1
    for hop in range(hops):
        name, old = next(names), name
        blocks.append(_hop(rng, name, old, family.sanitizers if hop == cleaned else _HOPS))
    call = _fill(rng, end, name)
    if rng.random() < _BRANCH_SHARE:
        blocks.append([f"if {_fill(rng, rng.choice(_TESTS), name)}:", f"    {call}"])
    else:
        blocks.append([call])
    return blocks


def _hop(rng: random.Random, new: str, old: str, forms: Sequence[str]) -> Block:
    if rng.random() >= _BRANCH_SHARE:
        return _assign(rng, new, rng.choice(forms), old)
    arms = [rng.choice(forms), rng.choice((rng.choice(forms), rng.choice(_CONSTANTS)))]
    rng.shuffle(arms)
    (then,), (otherwise,) = (_assign(rng, new, arm, old) for arm in arms)
    test = _fill(rng, rng.choice(_TESTS), old)
    return [f"if {test}:", f"    {then}", "else:", f"    {otherwise}"]


def _assign(rng: random.Random, new: str, form: str, old: str) -> Block:
    return [f"{new} = {_fill(rng, form, old)}"]


def _fill(rng: random.Random, form: str, x: str) -> str:
    return form.format(x=x, k=rng.choice(_WORDS))


def _shuffled_together(rng: random.Random, first: list[Block], second: list[Block]) -> list[Block]:
    turns = [0] * len(first) + [1] * len(second)
    rng.shuffle(turns)
    rest = (iter(first), iter(second))
    return [next(rest[turn]) for turn in turns]


def _put_between(host: Host, blocks: list[Block], rng: random.Random) -> str:
    cuts = sorted(rng.choices(host.cuts, k=len(blocks)))
    lines = list(host.lines)
    for cut, block in reversed(list(zip(cuts, blocks, strict=True))):
        lines[cut:cut] = [host.indent + line for line in block]
    return "\n".join(lines)
