"""What the unit files and their companions promise, read as systemd reads them."""

import re
from pathlib import Path

import pytest

from taskd.config import values
from taskd.config.schema import Settings
from taskd.errors import EX_CONFIG
from taskd.journal import MessageId

ROOT = Path(__file__).parents[2]
CATALOG = (ROOT / "packaging/taskd.catalog").read_text()

# systemd.exec(5), NoNewPrivileges=: each of these sets it, whatever the unit says.
IMPLY_NO_NEW_PRIVILEGES = {
    "DynamicUser",
    "LockPersonality",
    "MemoryDenyWriteExecute",
    "PrivateDevices",
    "ProtectClock",
    "ProtectHostname",
    "ProtectKernelLogs",
    "ProtectKernelModules",
    "ProtectKernelTunables",
    "RestrictAddressFamilies",
    "RestrictNamespaces",
    "RestrictRealtime",
    "RestrictSUIDSGID",
    "SystemCallArchitectures",
    "SystemCallFilter",
    "SystemCallLog",
}


def read_unit(name: str) -> dict[str, str]:
    """Every directive as `Section.Name`; none may come twice."""
    unit: dict[str, str] = {}
    section = ""
    for line in (ROOT / "units" / name).read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if heading := re.fullmatch(r"\[(\w+)\]", line):
            section = heading[1]
            continue
        key, equals, value = line.partition("=")
        assert equals, f"{name}: {line}"
        assert f"{section}.{key}" not in unit, f"{name}: {line}"
        unit[f"{section}.{key}"] = value
    return unit


SERVICE = read_unit("taskd.service")
SOCKET = read_unit("taskd.socket")


@pytest.mark.parametrize(
    ("directive", "value"),
    [
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("User", "taskd"),
        ("Group", "taskd"),
        ("ExecStart", "/usr/bin/taskd"),
        ("ExecReload", "/usr/bin/taskctl reload"),
        ("Sockets", "taskd.socket"),
        ("Restart", "on-failure"),
        ("RestartPreventExitStatus", str(EX_CONFIG)),
        ("WatchdogSec", "30s"),
        ("KillMode", "mixed"),
        ("OOMPolicy", "continue"),
        ("Delegate", "yes"),
        ("StateDirectory", "taskd"),
        ("StateDirectoryMode", "2770"),
        ("ConfigurationDirectory", "taskd"),
        ("UMask", "0007"),
        ("LogRateLimitIntervalSec", "0"),
        ("LimitNOFILE", "65536"),
        ("TasksMax", "infinity"),
        ("NoNewPrivileges", "yes"),
    ],
)
def test_the_service_is_run_as_designed(directive: str, value: str) -> None:
    assert SERVICE[f"Service.{directive}"] == value


def test_the_socket_is_the_control_socket_and_outlives_the_service() -> None:
    assert SOCKET["Socket.ListenStream"] == str(Settings().control)
    assert SOCKET["Socket.FileDescriptorName"] == "control"
    assert SOCKET["Socket.SocketMode"] == "0660"
    assert SOCKET["Socket.SocketGroup"] == SERVICE["Service.Group"]
    assert SOCKET.get("Socket.RemoveOnStop", "no") == "no"
    assert "Service.RuntimeDirectory" not in SERVICE


def test_the_store_of_the_default_configuration_lies_in_the_state_directory() -> None:
    directory = f"/var/lib/{SERVICE['Service.StateDirectory']}"
    assert Settings().store.removeprefix("sqlite:///").startswith(f"{directory}/")


def test_a_stop_has_time_for_the_default_drain_and_what_follows() -> None:
    stop = values.parse_span(SERVICE["Service.TimeoutStopSec"])
    assert stop >= Settings().drain_timeout + 60


def test_the_cgroups_stay_writable_for_taskd() -> None:
    assert SERVICE["Service.ProtectControlGroups"] == "no"


def test_one_line_is_enough_to_allow_setuid_programs() -> None:
    implying = {
        key for key in IMPLY_NO_NEW_PRIVILEGES if SERVICE.get(f"Service.{key}", "no") != "no"
    }
    assert implying == set()


def test_every_hardening_that_is_off_says_why() -> None:
    blocks = re.findall(
        r"^((?:#.*\n)+)((?:\w+=.*\n)+)", (ROOT / "units/taskd.service").read_text(), re.M
    )
    explained = {line.split("=")[0] for _, lines in blocks for line in lines.splitlines()}
    off = {key.removeprefix("Service.") for key, value in SERVICE.items() if value == "no"}
    assert len(off) > 5
    assert off <= explained


def test_service_and_socket_start_with_the_machine() -> None:
    assert SERVICE["Install.WantedBy"] == "multi-user.target"
    assert SERVICE["Install.Also"] == "taskd.socket"
    assert SOCKET["Install.WantedBy"] == "sockets.target"


# The catalog


def entries() -> dict[str, str]:
    parts = re.split(r"^-- ([0-9a-f]+)\n", CATALOG, flags=re.M)
    ids, texts = parts[1::2], parts[2::2]
    assert len(ids) == len(set(ids))
    return dict(zip(ids, texts, strict=True))


def test_the_catalog_explains_every_message_id_and_no_other() -> None:
    assert set(entries()) == set(MessageId)


@pytest.mark.parametrize("id", list(MessageId), ids=lambda id: id.name)
def test_a_catalog_entry_has_a_subject_and_an_explanation(id: MessageId) -> None:
    header, _, text = entries()[id].partition("\n\n")
    fields = dict(line.split(": ", 1) for line in header.splitlines())
    assert fields["Subject"]
    assert fields["Defined-By"] == "taskd"
    assert text.strip()
    if id.name.startswith("JOB_"):
        assert "@TASKD_JOB_ID@" in fields["Subject"]


def test_the_catalog_refers_to_fields_that_job_entries_carry() -> None:
    assert set(re.findall(r"@(\w+)@", CATALOG)) <= {
        "TASKD_JOB_ID",
        "TASKD_TASK",
        "TASKD_QUEUE",
        "TASKD_ATTEMPT",
    }
