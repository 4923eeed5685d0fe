"""The .deb: what it is made of, and what installing, upgrading, removing and purging do."""

import re
from pathlib import Path

import pytest

from taskd import __version__
from tests.support.debian import ROOT, run
from tests.support.needs import needs
from tests.systemd.machine import Machine
from tests.systemd.taskd import BASIC, Taskd

INSTALL = "apt-get install --yes /root/taskd.deb"


def field(deb: Path, name: str) -> str:
    return run("dpkg-deb", "--field", deb, name).strip()


def test_it_depends_on_debians_own_packages_and_on_no_architecture(deb: Path) -> None:
    depends = {re.split(r"[ :]", word)[0] for word in field(deb, "Depends").split(", ")}
    libraries = {name for name in depends if name.startswith("python3-")}
    assert libraries == {
        f"python3-{name}" for name in ("click", "pika", "rich", "sdnotify", "sqlalchemy", "systemd")
    }
    assert depends - libraries == {"python3", "systemd"}
    assert field(deb, "Architecture") == "all"
    assert field(deb, "Version") == __version__
    assert field(deb, "Conflicts") == "taskd"
    suggests = set(field(deb, "Suggests").split(", "))
    drivers = {f"python3-{name}" for name in ("psycopg", "psycopg2", "pymysql")}
    assert suggests == drivers | {"rabbitmq-server"}


def test_lintian_has_nothing_against_it(deb: Path) -> None:
    needs("lintian")
    assert run("lintian", "--fail-on", "error,warning", "--allow-root", deb) == ""


@pytest.mark.parametrize("page", ["taskd.8", "taskctl.1", "taskd.conf.5"])
def test_a_manual_page_is_well_formed(page: str) -> None:
    needs("mandoc")
    needs("man")
    path = ROOT / "packaging/man" / page
    assert run("mandoc", "-T", "lint", "-W", "warning", path) == ""
    drawn = run("man", "--warnings", "--local-file", path, MANWIDTH="80", LC_ALL="C.UTF-8")
    assert "warning: " not in drawn
    assert "NAME" in drawn


def test_installing_enables_and_starts_everything_in_order(bare: Machine) -> None:
    bare.sh(INSTALL)
    for unit in "taskd.service", "taskd.socket":
        shown = bare.show(unit, "ActiveState", "UnitFileState")
        assert shown == {"ActiveState": "active", "UnitFileState": "enabled"}
    # Once, without a failure before: user, group and /run/taskd were there.
    assert bare.show("taskd.service", "NRestarts", "Result") == {
        "NRestarts": "0",
        "Result": "success",
    }
    assert bare.run("taskctl", "ping").out == "PONG\n"
    assert bare.sh("systemctl --failed --plain --no-legend") == ""
    modes = bare.sh(
        "stat -c '%a %U:%G %n' /var/lib/taskd /run/taskd /run/taskd/control.sock /etc/taskd"
    )
    assert modes.splitlines() == [
        "2770 taskd:taskd /var/lib/taskd",
        "751 taskd:taskd /run/taskd",
        "660 root:taskd /run/taskd/control.sock",
        "755 root:root /etc/taskd",
    ]
    # What is not meant for every machine is not enabled.
    assert bare.get("taskd-reload.path", "UnitFileState") == "disabled"


def test_manual_catalog_and_completion_are_found_once_installed(bare: Machine) -> None:
    bare.sh(INSTALL)
    for page in "taskd.8", "taskctl.1", "taskd.conf.5":
        name, _, section = page.rpartition(".")
        assert bare.run("man", "--where", section, name).out.endswith(f"{page}.gz\n")
    assert "Job @TASKD_JOB_ID@ failed" in bare.run("journalctl", "--list-catalog").out
    bash = "source /usr/share/bash-completion/bash_completion; _completion_loader taskctl || :"
    assert "_taskctl_completion" in bare.run("bash", "-c", f"{bash}; complete -p taskctl").out
    zsh = "autoload -U compinit; compinit -u; print $_comps[taskctl]"
    assert bare.run("zsh", "-c", zsh).out == "_taskctl\n"


def newer(deb: Path, directory: Path) -> Path:
    """The same package with a higher version, as an upgrade."""
    tree = directory / "tree"
    run("dpkg-deb", "--raw-extract", deb, tree)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"^Version: .*", r"\g<0>+1", control.read_text(), flags=re.M))
    run("dpkg-deb", "--build", "--root-owner-group", tree, directory / "newer.deb")
    return directory / "newer.deb"


def test_an_upgrade_lets_jobs_finish_and_refuses_no_client(
    bare: Machine, deb: Path, tmp_path: Path
) -> None:
    bare.sh(INSTALL)
    taskd = Taskd(bare)
    taskd.reset()
    taskd.start()
    bare.sh("echo '# ours' >>/etc/taskd/taskd.conf")
    job = taskd.submit("wait", file=taskd.file())
    taskd.until(job, "running")
    pid = taskd.pid
    bare.path("/root/newer.deb").write_bytes(newer(deb, tmp_path).read_bytes())
    with bare.running("dpkg", "--install", "/root/newer.deb") as upgrade:
        taskd.until_status("draining")
        with bare.running("taskctl", "job", job) as client:  # it waits for the new one
            taskd.let_go()
            said, _ = upgrade.communicate(timeout=120)
            answer, _ = client.communicate(timeout=60)
            assert client.returncode == 0, answer
    assert upgrade.returncode == 0, said
    assert taskd.pid not in (0, pid)
    row = taskd.until(job, "succeeded")
    assert [attempt["state"] for attempt in row["attempts"]] == ["succeeded"]
    assert bare.sh("tail -n 1 /etc/taskd/taskd.conf") == "# ours\n"
    assert bare.run("dpkg-query", "-Wf${Version}", "taskd-service").out.endswith("+1")


def test_an_upgrade_leaves_a_service_off_that_was_switched_off(
    bare: Machine, deb: Path, tmp_path: Path
) -> None:
    bare.sh(f"{INSTALL}; systemctl disable --now taskd.socket taskd.service")
    bare.path("/root/newer.deb").write_bytes(newer(deb, tmp_path).read_bytes())
    bare.sh("dpkg --install /root/newer.deb")
    for unit in "taskd.service", "taskd.socket":
        shown = bare.show(unit, "ActiveState", "UnitFileState")
        assert shown == {"ActiveState": "inactive", "UnitFileState": "disabled"}


def test_removing_keeps_state_and_configuration_and_purging_takes_both(bare: Machine) -> None:
    bare.sh(INSTALL)
    bare.write("/etc/taskd/conf.d/test.conf", BASIC)
    bare.sh("systemctl reload taskd; systemctl enable --now taskd-reload.path")
    bare.run("taskctl", "submit", "echo", '{"words": "kept"}', "--id", "kept", "--wait")

    bare.sh("apt-get remove --yes taskd-service")
    assert bare.run("pgrep", "-u", "taskd", check=False).out == ""
    assert bare.sh("systemctl list-units --plain --no-legend 'taskd*'") == ""
    for path in "/var/lib/taskd/taskd.db", "/etc/taskd/taskd.conf":
        assert bare.path(path).exists()
    assert not bare.path("/usr/lib/python3/dist-packages/taskd").exists()

    bare.sh(INSTALL)
    assert '"state": "succeeded"' in bare.run("taskctl", "--json", "job", "kept").out

    bare.sh("rm /etc/taskd/conf.d/test.conf; apt-get purge --yes taskd-service")
    for path in "/var/lib/taskd", "/etc/taskd", "/run/taskd", "/etc/systemd/system/taskd.service.d":
        assert not bare.path(path).exists(), path
    links = bare.sh("find /etc/systemd/system /var/lib/systemd -name '*taskd*'")
    assert links == ""


def test_it_does_not_share_a_machine_with_taskserver(bare: Machine, tmp_path: Path) -> None:
    """Debian's taskd has a unit and a command of the same names."""
    control = tmp_path / "taskserver/DEBIAN/control"
    control.parent.mkdir(parents=True)
    control.write_text(
        "Package: taskd\nVersion: 1.1.0\nArchitecture: all\n"
        "Maintainer: nobody <nobody@localhost>\nDescription: stands for Taskserver\n"
    )
    run("dpkg-deb", "--build", "--root-owner-group", tmp_path / "taskserver", tmp_path / "its.deb")
    bare.path("/root/its.deb").write_bytes((tmp_path / "its.deb").read_bytes())
    bare.sh("dpkg --install /root/its.deb")
    refused = bare.run("dpkg", "--install", "/root/taskd.deb", check=False)
    assert refused.code != 0
    assert "conflicting packages" in refused.err


def test_the_smoke_test_of_the_package_passes(bare: Machine) -> None:
    bare.sh(INSTALL)
    bare.write("/root/smoke", (ROOT / "debian/tests/smoke").read_text(), 0o755)
    bare.run("/root/smoke")
