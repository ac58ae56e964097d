"""Let one process at a time work in a folder, on any file system, and whatever becomes of that process.

The holder keeps ``.lock`` locked (``flock``, which ends with the process), says in ``.holder.json`` who it
is, and touches that file every few seconds. Where the file system knows no locks, or keeps them to one
machine (Lustre, some NFS and FUSE), the second file decides: whoever is first makes it, and it is of no
account once its process is gone from this machine, or has not touched it for a while by the file system's
own clock.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from threading import Event, Lock, Thread

from .errors import UserError, printable

LOCK, HOLDER = ".lock", ".holder.json"
TOUCH_S = 5.0  # between two signs of life
SILENT_S = 30.0  # after which a process on another machine is taken for dead
SETTLE_S = 1.0  # in which two that take over the same folder see each other
RETRY_S = 0.2
LOOKS = 3  # at a locked folder that nobody says to hold: a dry run may be looking at it

_held: set[int] = set()  # locked files, which a forked process must not hold on to


def _close_inherited() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


def _born(pid: int) -> int | None:
    """Return when a process of this machine began, in clock ticks; None if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie is dead


def _machine() -> str:
    """Return what tells this machine, since it was started, and its process numbers from others'."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux: then processes are known by their signs of life alone
        return uuid.uuid4().hex


@dataclass(frozen=True)
class Holder:
    """Who holds a folder.

    Attributes:
        host: name of its machine.
        pid: its process number there.
        since: local time at which it took the folder.
        born: start of the process; with ``machine`` it tells the process from a later one of the same number.
        machine: as :func:`_machine` gives it.
        token: of this very lock.
    """

    host: str
    pid: int
    since: str
    born: int | None
    machine: str
    token: str

    @classmethod
    def myself(cls) -> Holder:
        """Describe this process."""
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        pid = os.getpid()
        return cls(platform.node(), pid, now, _born(pid), _machine(), uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def lives(self) -> bool | None:
        """Tell whether the process is still there; None if it cannot be seen from here."""
        if self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's, whose times may be hidden
            return _born(self.pid) in (None, self.born)
        return _born(self.pid) == self.born


@dataclass(frozen=True)
class _Sign:
    """What was seen of a holder at one moment."""

    holder: Holder | None  # None: not written yet, or damaged
    touched: int  # ns, by the file system's clock


class FolderLock:
    """Hold a folder alone, as a context manager; it is made, and removed again if nothing came into it.

    Args:
        folder: to hold.
        wait: for the process that holds it, and do not refuse.

    Raises:
        UserError: on entering, if another process holds it: which, where and since when; if the folder can't
            be written.
    """

    def __init__(self, folder: Path, wait: bool = False) -> None:
        self.folder, self._wait = folder, wait
        self._record = folder / HOLDER
        self._lock = -1
        self._made: list[Path] = []
        self._taken_by: Holder | None = None
        self._left = Event()
        self._record_in_use = Lock()  # by the thread that shows life, or by the end
        self._told = False

    def __enter__(self) -> FolderLock:
        self._me = Holder.myself()
        try:
            self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            while (holder := self._take()) is not None:
                if not self._wait:
                    raise _in_use(self.folder, holder)
                time.sleep(RETRY_S)
        except OSError as error:
            raise UserError(
                f"{error.filename or self.folder}: cannot be written: {error.strerror}"
            ) from error
        Thread(target=self._show_life, name="lock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._me.pid != os.getpid():  # a forked process has nothing to give back
            return
        self._left.set()
        with suppress(OSError), self._record_in_use:  # what stays behind names a process that is gone
            sign = _look(self._record)
            if sign is None or sign.holder == self._me:
                if sign is not None:
                    self._record.unlink()
                if os.path.samestat((self.folder / LOCK).stat(), os.fstat(self._lock)):
                    (self.folder / LOCK).unlink()
        self._close(self._lock)
        with suppress(OSError):  # there is something in it
            for folder in self._made:
                folder.rmdir()

    def check(self) -> None:
        """Refuse to go on if another process took the folder over while this one was taken for dead.

        Raises:
            UserError: naming it.
        """
        if self._taken_by is not None:
            raise UserError(
                f"{self.folder}: taken over by {self._taken_by}, because this process gave no sign of "
                f"life for {SILENT_S:.0f} s (suspended? the disk out of reach?)"
            )

    def _take(self) -> Holder | str | None:
        """Take the folder and return None, or return who has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, looks = self.folder / LOCK, 0
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            _held.add(lock)
            locked = True
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._close(lock)
                sign, looks = _look(self._record), looks + 1
                named = sign is not None and sign.holder is not None and sign.holder.lives() is not False
                if named or looks == LOOKS:
                    return _name(sign)
                time.sleep(RETRY_S)
                continue
            except OSError:  # no locks here: the record decides
                locked = False
            with suppress(FileNotFoundError):
                if os.path.samestat(path.stat(), os.fstat(lock)):
                    break
            self._close(lock)  # its holder removed it just now
        own = self.folder / f"{HOLDER}.{self._me.token}"
        try:
            holder = self._claim(own, locked)
        except BaseException:
            self._close(lock)
            raise
        finally:
            own.unlink(missing_ok=True)
        if holder is None:
            self._lock = lock
        else:
            self._close(lock)
        return holder

    def _claim(self, own: Path, locked: bool) -> Holder | str | None:
        """Put down that this process holds the folder and return None; or return who does."""
        while True:
            own.write_text(json.dumps(asdict(self._me)), encoding="utf-8")
            try:
                self._record.touch(exist_ok=False)
            except FileExistsError:
                sign = _look(self._record)
                if sign is None:
                    continue  # it left just now
                if self._works(sign, own):
                    return _name(sign)
                own.replace(self._record)
                if not locked or sign.holder is None or sign.holder.machine != self._me.machine:
                    time.sleep(SETTLE_S)  # others may be doing the same
                now = _look(self._record)
                if now is not None and now.holder == self._me:
                    return None
            else:
                own.replace(self._record)
                return None

    def _works(self, sign: _Sign, own: Path) -> bool:
        """Tell whether a holder is still there; one on another machine is watched for up to ``SILENT_S``."""
        lives = None if sign.holder is None else sign.holder.lives()
        if lives is not None:
            return lives
        silent_s = (own.stat().st_mtime_ns - sign.touched) / 1e9
        left_s = SILENT_S - max(silent_s, 0)
        until = time.monotonic() + left_s
        if left_s > TOUCH_S and not self._told:
            self._told = True
            wait = f"{self.folder}: in use by {_name(sign)}? Waiting {left_s:.0f} s for a sign of life"
            print(printable(wait), file=sys.stderr)
        while time.monotonic() < until:
            time.sleep(RETRY_S)
            if _look(self._record) != sign:
                return True
        return False

    def _show_life(self) -> None:
        """Touch the record now and then, and see whether it is still this process's."""
        while not self._left.wait(TOUCH_S):
            with suppress(OSError), self._record_in_use:  # a disk that is out of reach may come back
                if self._left.is_set():
                    return
                sign = _look(self._record)
                if sign is None:  # somebody removed it, and may be about to take the folder
                    with self._record.open("x", encoding="utf-8") as file:
                        json.dump(asdict(self._me), file)
                    continue
                if sign.holder not in (None, self._me):
                    self._taken_by = sign.holder
                    return
                os.utime(self._record)

    @staticmethod
    def _close(lock: int) -> None:
        _held.discard(lock)
        os.close(lock)


def _look(record: Path) -> _Sign | None:
    """Read a record, None if there is none; opened anew, so that a network disk asks its server."""
    try:
        with record.open("rb") as file:
            touched = os.fstat(file.fileno()).st_mtime_ns
            text = file.read()
    except FileNotFoundError:
        return None
    try:
        return _Sign(Holder(**json.loads(text)), touched)
    except (ValueError, TypeError):
        return _Sign(None, touched)


def _name(sign: _Sign | None) -> Holder | str:
    return "another process" if sign is None or sign.holder is None else sign.holder


def _in_use(folder: Path, holder: Holder | str) -> UserError:
    return UserError(f"{folder}: in use by {holder}; wait for it, stop it, or choose another folder")


def refuse_held(folder: Path) -> None:
    """Refuse a folder that another process seems to hold, without a wait and without writing to it.

    Raises:
        UserError: as :class:`FolderLock`.
    """
    sign = _look(folder / HOLDER)
    try:
        lock = os.open(folder / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(folder, _name(sign)) from None
    except OSError:  # no locks here: the record decides
        pass
    finally:
        os.close(lock)
    if sign is not None and sign.holder is not None and sign.holder.lives():
        raise _in_use(folder, sign.holder)
