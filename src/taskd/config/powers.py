"""Powers: what the daemon may do, which its jobs cannot go beyond.

They follow from capabilities(7) and its own limits, not from its being root: root in a container
has few of them, and a unit can give some to any user.
"""

import os
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taskd.config.limits import RLIMITS, Identity

# Those that matter here, as the kernel's linux/capability.h numbers them.
_NUMBERS = {
    "CAP_CHOWN": 0,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SYS_NICE": 23,
    "CAP_SYS_RESOURCE": 24,
}
# The kernel asks for them outside of all user namespaces.
_OF_THE_MACHINE = frozenset({"CAP_SYS_NICE", "CAP_SYS_RESOURCE"})
_EVERYBODY = "4294967295"  # as many users as user_namespaces(7) shows where there is no namespace
# setpriv changes to them, and their pipes and signals take the other two.
_AS_OTHERS = ("CAP_SETUID", "CAP_SETGID", "CAP_CHOWN", "CAP_KILL")
_NOBODY_BUT_ROOT = "taskd runs as root, so it must know as whom the jobs run: user = NAME"


@dataclass(frozen=True, slots=True, kw_only=True)
class Powers:
    """A daemon's."""

    uid: int
    capabilities: frozenset[str]
    limits: Mapping[str, float]  # its hard rlimits, by the names of RLIMITS
    niceness: int
    nice_limit: float  # the soft one: to 20 less this it may go without a capability
    oom_score_adjust: int
    files_max: float  # fs.nr_open, which binds the mightiest


def own_powers() -> Powers:
    return Powers(
        uid=os.geteuid(),
        capabilities=frozenset(_capabilities()),
        limits={name: _bound(resource.getrlimit(_number(name))[1]) for name in RLIMITS},
        niceness=os.nice(0),
        nice_limit=_bound(resource.getrlimit(resource.RLIMIT_NICE)[0]),
        oom_score_adjust=int(Path("/proc/self/oom_score_adj").read_text()),
        files_max=_files_max(),
    )


def forbidden(options: Mapping[str, Any], who: Identity, powers: Powers) -> dict[str, str]:
    """What a daemon of these powers cannot do for a task whose jobs run as `who`: option, why."""
    if powers.uid == 0 and options.get("user") is None:
        return {"": _NOBODY_BUT_ROOT}
    return dict([*_identity(options, who, powers), *_limits(options, powers)])


def _identity(
    options: Mapping[str, Any], who: Identity, powers: Powers
) -> Iterator[tuple[str, str]]:
    if options.get("user") is not None and who.uid != powers.uid:
        yield from _takes(powers, "user", "to run jobs as somebody else", *_AS_OTHERS)
    for key in "group", "supplementary_groups":
        if options.get(key):
            yield from _takes(powers, key, "to set it", "CAP_SETGID")


def _limits(options: Mapping[str, Any], powers: Powers) -> Iterator[tuple[str, str]]:
    for name in RLIMITS:
        if (limit := options.get(f"limit_{name}")) is None:
            continue
        key, wanted, own = f"limit_{name}", _bound(limit[1]), powers.limits[name]
        if name == "nofile" and wanted > powers.files_max:
            yield key, f"the kernel gives at most {powers.files_max:.0f} (fs.nr_open)"
        elif wanted > own:
            yield from _takes(powers, key, f"more than its own {own:.0f}", "CAP_SYS_RESOURCE")
    # prlimit comes before nice.
    soft = powers.nice_limit if options.get("limit_nice") is None else options["limit_nice"][0]
    nice = options.get("nice") or 0
    if nice < 0 and powers.niceness + nice < 20 - _bound(soft):
        what = f"less than its own niceness of {powers.niceness}"
        yield from _takes(powers, "nice", what, "CAP_SYS_NICE")
    adjust = options.get("oom_score_adjust")
    if adjust is not None and adjust < powers.oom_score_adjust:
        what = f"less than its own {powers.oom_score_adjust}"
        yield from _takes(powers, "oom_score_adjust", what, "CAP_SYS_RESOURCE")


def _takes(powers: Powers, key: str, what: str, *capabilities: str) -> Iterator[tuple[str, str]]:
    lacking = [each for each in capabilities if each not in powers.capabilities]
    if lacking:
        root = " (root has)" if powers.uid else ""
        yield key, f"{what} takes {', '.join(lacking)}, which this taskd does not have{root}"


def _capabilities() -> Iterator[str]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    effective = int(fields["CapEff"], 16)
    inside = Path("/proc/self/uid_map").read_text().split() != ["0", "0", _EVERYBODY]
    for name, number in _NUMBERS.items():
        if effective >> number & 1 and not (inside and name in _OF_THE_MACHINE):
            yield name


def _files_max() -> float:
    try:
        return int(Path("/proc/sys/fs/nr_open").read_text())
    except FileNotFoundError:  # ProcSubset=pid: then only the kernel knows it
        return float("inf")


def _number(name: str) -> int:
    number: int = getattr(resource, f"RLIMIT_{name.upper()}")
    return number


def _bound(value: float | None) -> float:
    return float("inf") if value in (None, resource.RLIM_INFINITY) else float(value or 0)
