"""The daemon: owns everything below it, and its life from the first signal mask to exit 0.

starting -> running -> draining -> stopped
                         |  patience over, or a second signal
                         v
                      stopping -> stopped
"""

import logging
import signal
import socket
import uuid
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from taskd import journal
from taskd.children import notify
from taskd.children.child import Children
from taskd.children.guardian import Guardian
from taskd.config import reader
from taskd.config.diff import Diff, diff
from taskd.config.powers import own_powers
from taskd.config.schema import Config
from taskd.config.values import format_span
from taskd.control import commands, report
from taskd.control.desk import Desk
from taskd.control.server import Server
from taskd.errors import ConfigError
from taskd.journal import MessageId
from taskd.kernel.loop import Loop, Timer
from taskd.kernel.process import become_subreaper, seal_descriptors
from taskd.kernel.signals import SignalFd
from taskd.service import Service
from taskd.states import DAEMON_MOVES, DaemonState, StoreState, move
from taskd.store.recorder import Recorder
from taskd.store.retention import Retention
from taskd.work.admission import Admission
from taskd.work.cancel import Cancelling
from taskd.work.containment import Containment
from taskd.work.events import Events
from taskd.work.intake import Intake
from taskd.work.lease import Lease
from taskd.work.pool import Pool
from taskd.work.rows import Rows
from taskd.work.story import Story

log = logging.getLogger(__name__)

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGCHLD,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
# While we drain, systemd is asked this often for this much more time.
EXTEND_EVERY = 10.0
EXTEND_BY = 30.0
# After the last child was told to stop: how long its record and its settlement may take.
LAST_PATIENCE = 15.0
# How long no job starts after the machine had no process or memory for one.
SPAWN_REST = 2.0

STORE = "store away"
DRAIN = "draining"
NO_SPAWN = "nothing can be started"


class Daemon:
    def __init__(
        self,
        path: Path,
        config: Config,
        *,
        service: Service,
        sink: journal.Sink,
        handler: journal.Handler,
    ) -> None:
        self.path = path
        self.config = config
        self.state = DaemonState.STARTING
        self._ready = False
        self._telling = False  # STATUS is to be renewed at the end of this pass
        self.trouble = ""  # why the last reload was refused
        self.waiting = ""  # until when a stop does
        self._quitting: Timer | None = None
        self._service = service
        self._sink = sink
        self._handler = handler
        self._set_level()
        # Before any thread exists: threads inherit the mask, and a signal goes to any thread
        # that does not block it.
        self._signals = SignalFd(SIGNALS)
        seal_descriptors()
        become_subreaper()
        self.host = socket.gethostname()
        self.loop = Loop()
        self.loop.add_handler(self._signals.fd, self._on_signals, Loop.READ)
        daemon_id = f"{self.host}-{uuid.uuid4().hex[:12]}"
        self.recorder = Recorder(
            self.loop, config.settings.store, daemon_id=daemon_id, on_state=self._on_store
        )
        self.containment = Containment()
        self.containment.keep(config.tasks.values())
        self.children = self._make_children()
        self.events = Events()
        story = Story(self.events, sink.encode)
        self.pool = Pool(
            self.loop,
            self.recorder,
            self.children,
            config,
            rows=Rows(host=self.host, daemon_id=daemon_id),
            story=story,
        )
        self.cancelling = Cancelling(self.pool, self.recorder, story)
        self.pool.on_settled = self._on_settled
        self.pool.on_no_spawn = self._on_no_spawn
        self.intake = Intake(
            self.loop,
            self.pool,
            self.recorder,
            config,
            host=self.host,
            on_change=self._tell,
        )
        self.intake.hold(STORE)
        self.admission = Admission(self.loop, hold=self.intake.hold, release=self.intake.release)
        self.admission.keep(config.settings.pressure_limits)
        self.pool.on_fill = self.admission.on_fill
        self.lease = None if self.recorder.private else self._make_lease()
        self.retention = Retention(self.loop, self.recorder, config.settings.keep_jobs)
        self._server = self._make_server()

    def run(self) -> int:
        """Work until stopped; the exit code."""
        self.recorder.start()
        self.intake.start()
        self._beat()
        try:
            self.loop.start()
        finally:
            self._close()
        return 0

    def _make_children(self) -> Children:
        directory = self.config.settings.control.parent / "notify"
        # Under systemd the unit's cgroup ends what we leave behind.
        guardian = None if self._service.under_systemd else Guardian(notify.mark(directory))
        return Children(
            self.loop,
            self._sink,
            notify_directory=directory,
            guardian=guardian,
            groups=self.containment.groups,
        )

    def _make_lease(self) -> Lease:
        return Lease(
            self.loop,
            self.recorder,
            self.pool,
            self.intake,
            host=self.host,
            length=self.config.settings.lease,
            on_held=self._open_store,
            on_lost=lambda: self.intake.hold(STORE),
        )

    def _make_server(self) -> Server:
        settings = self.config.settings
        inherited = [one for sockets in self._service.inherited().values() for one in sockets]
        server = Server(
            self.loop, inherited, commands.verbs(Desk(self)), password=settings.control_password
        )
        if not inherited:
            server.listen(settings.control)
        if settings.control_tcp is not None:
            server.listen_tcp(settings.control_tcp)
        return server

    # Events

    def _on_signals(self, fd: int, events: int) -> None:
        for number in self._signals.read():
            match number:
                case signal.SIGCHLD:
                    # The pipes of who has exited have ended too, and come up in this very pass:
                    # after them, a child is at its end with its exit.
                    self.loop.call_before_wait(self.children.reap)
                case signal.SIGTERM | signal.SIGINT:
                    log.info("%s received", signal.Signals(number).name)
                    if self.state is DaemonState.RUNNING:
                        self.shutdown()
                    else:
                        self._stop(kill=self.state is DaemonState.STOPPING)
                case signal.SIGHUP:
                    self._on_hangup()
                case signal.SIGUSR1:
                    report.snapshot(self)
                case signal.SIGUSR2:
                    self._toggle_debug()

    def _on_hangup(self) -> None:
        with suppress(ConfigError):  # said by `reload`, in the journal and in STATUS
            self.reload()

    def _on_store(self, state: StoreState, reason: str) -> None:
        match state:
            case StoreState.UP:
                _say(logging.INFO, MessageId.STORE_BACK, "store: up")
                start = self._open_store if self.lease is None else self.lease.start
                start()
            case StoreState.AWAY:
                _say(
                    logging.WARNING,
                    MessageId.STORE_AWAY,
                    "store: %s; queues paused, running jobs go on, retried until it is back",
                    reason,
                )
                self.intake.hold(STORE)
        self._announce()

    def _open_store(self) -> None:
        if self.recorder.recovered:
            log.warning(
                "store: %d jobs were interrupted by the end of an earlier daemon",
                self.recorder.recovered,
            )
            self.recorder.recovered = 0
        self.intake.release(STORE)
        self.retention.start()
        self._tell()

    def _announce(self) -> None:
        """The first try at the store is made, whatever came of it: we are ready."""
        if not self._ready:
            self._ready = True
            self._move(DaemonState.RUNNING)
            self._service.ready()
            _say(
                logging.INFO,
                MessageId.STARTED,
                "ready: %d queues, %d tasks",
                len(self.config.queues),
                len(self.config.tasks),
            )
            self._warn()
        self._tell()

    def _warn(self) -> None:
        for warning in self.config.warnings():
            log.warning("%s", warning)

    def _on_no_spawn(self, reason: str) -> None:
        if not self.intake.held(NO_SPAWN):
            log.error("%s; nothing is started for %s", reason, format_span(SPAWN_REST))
            self.intake.hold(NO_SPAWN)
            self.loop.call_later(SPAWN_REST, lambda: self.intake.release(NO_SPAWN))

    def _on_settled(self) -> None:
        if self.intake.retired:
            self.intake.sweep()
        if self.state in (DaemonState.DRAINING, DaemonState.STOPPING):
            self._finish()

    # systemd

    def _beat(self) -> None:
        """The watchdog's beat: the loop turns, and the recorder is not stuck."""
        interval = self._service.watchdog_interval
        if interval is None:
            return
        if not self.recorder.stuck(self.loop.now()):
            self._service.watchdog()
        self._handler.flush()
        self.loop.call_later(interval, self._beat)

    def _tell(self) -> None:
        """Renew STATUS, once a pass however much has changed."""
        if not self._telling:
            self._telling = True
            self.loop.call_before_wait(self._on_tell)

    def _on_tell(self) -> None:
        self._telling = False
        self._service.status(report.status(self))

    # Reload

    def reload(self, *, dry: bool = False) -> list[str]:
        """Read everything again and apply the difference in one step; what changes, in words.

        Raises ConfigError, with every problem, and then nothing has changed.
        """
        if dry:
            return diff(self.config, reader.read(self.path, powers=own_powers())).lines()
        self._service.reloading()
        try:
            config = reader.read(self.path, powers=own_powers())
            change = diff(self.config, config)
            self._apply(config, change)
        except ConfigError as error:
            self._refuse(error)
            raise
        finally:
            self._service.ready()  # whatever came of it: systemd waits for that
            self._tell()
        return change.lines()

    def _refuse(self, error: ConfigError) -> None:
        for problem in error.problems:
            log.error("%s", problem)
        _say(
            logging.ERROR,
            MessageId.CONFIG_REFUSED,
            "reload refused: %d problems, the old configuration runs on",
            len(error.problems),
        )
        self.trouble = str(error.problems[0])

    def _apply(self, config: Config, change: Diff) -> None:
        self.config = config
        self.trouble = ""
        self._set_level()
        self.containment.keep(config.tasks.values())
        self.admission.keep(config.settings.pressure_limits)
        self.retention.keep(config.settings.keep_jobs)
        self._server.password = config.settings.control_password
        self.pool.configure(config)
        self.intake.configure(config)
        lines = change.lines()
        _say(
            logging.INFO,
            MessageId.RELOADED,
            "reload: %s",
            "; ".join(lines) if lines else "nothing changed",
        )
        self._warn()

    def _set_level(self) -> None:
        level = "debug" if self._service.debug_invocation else self.config.settings.log_level
        journal.set_level(level)

    def _toggle_debug(self) -> None:
        configured = self.config.settings.log_level
        if not log.isEnabledFor(logging.DEBUG):
            journal.set_level("debug")
        else:
            journal.set_level("info" if configured == "debug" else configured)
        log.warning("log level is %s", logging.getLevelName(log.getEffectiveLevel()).lower())

    # The end

    def drain(self) -> None:
        """Take nothing new; what runs goes on, and so does the daemon."""
        self.intake.hold(DRAIN)
        log.info("drained by request: nothing new is taken until `taskctl resume --all`")

    def undrain(self) -> None:
        self.intake.release(DRAIN)

    def shutdown(self) -> None:
        """Drain, then end: running jobs may finish for as long as `drain_timeout` says."""
        if self.state is DaemonState.STARTING:
            self.loop.stop()
        if self.state is not DaemonState.RUNNING:
            return
        self._move(DaemonState.DRAINING)
        patience = self.config.settings.drain_timeout
        _say(
            logging.INFO,
            MessageId.DRAINING,
            "drain: %d running jobs may finish within %s",
            self.pool.slots.taken,
            format_span(patience),
        )
        self._service.stopping()
        self.intake.hold("stopping")
        self._extend()
        self._quitting = self.loop.call_later(patience, self._stop)
        end = datetime.now().astimezone() + timedelta(seconds=patience)
        self.waiting = f"waits until {end:%H:%M:%S %Z}"
        self._finish()

    def _stop(self, *, kill: bool = False) -> None:
        """The patience is over: what runs is stopped, and goes back to its queue."""
        if self.state in (DaemonState.RUNNING, DaemonState.DRAINING):
            self._move(DaemonState.STOPPING)
            longest = max((job.task.stop_timeout for job in self.pool.jobs.values()), default=0)
            if self._quitting is not None:
                self._quitting.cancel()
            self._quitting = self.loop.call_later(longest + LAST_PATIENCE, self._give_up)
            self.waiting = "stops them and waits"
            log.info("stop: %d running jobs are stopped and handed back", self.pool.slots.taken)
        self.pool.interrupt(kill=kill)
        self._finish()

    def _give_up(self) -> None:
        log.error(
            "stop: %d jobs could not be recorded (store: %s); their messages come again",
            len(self.pool.jobs),
            self.recorder.status()["reason"] or "up",
        )
        self.loop.stop()

    def _extend(self) -> None:
        if self.state in (DaemonState.DRAINING, DaemonState.STOPPING):
            self._service.extend_timeout(EXTEND_BY)
            self.loop.call_later(EXTEND_EVERY, self._extend)

    def _finish(self) -> None:
        """End once every job is settled and every settlement has been confirmed."""
        self._tell()
        if self.pool.jobs:
            return
        if self.intake.drained() and self._server.part():
            self.loop.stop()
        else:
            # Confirms come from the broker, answers leave for clients; there is no one event
            # for the last of them.
            self.loop.call_later(0.02, self._finish)

    def _close(self) -> None:
        if self.state is not DaemonState.STOPPED:
            self.state = DaemonState.STOPPED
        self._server.close()
        self.retention.close()
        self.admission.close()
        self.intake.close()
        if self.lease is not None:
            self.lease.close(leave=not self.pool.jobs)
        # One more pass, so that what was said to the brokers leaves.
        self.loop.call_later(0, lambda: None)
        self.loop.run_once()
        self.recorder.close(patience=LAST_PATIENCE)
        self.children.close()
        _say(logging.INFO, MessageId.STOPPED, "stopped")
        self._handler.flush()

    def _move(self, state: DaemonState) -> None:
        self.state = move(DAEMON_MOVES, self.state, state)


def _say(level: int, message_id: MessageId, text: str, *args: object) -> None:
    journal.event(log, level, message_id, b"", text, *args)
