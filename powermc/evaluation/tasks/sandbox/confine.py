"""What a child process takes from itself before it runs code of a model. Standard library only; Linux for most of it.

Each layer is one-way: no code that runs later in the process undoes it. `confine` raises where a layer cannot be had
and `strict` is set; otherwise it goes on and says what there is.

====================  ==================================================================================
resource limits       CPU seconds, address space, no bytes into any file, no new process (not for root), no core dump
privileges            no capabilities, none to be gained (`no_new_privs`); not to be traced by others; ends
                      with whoever started it
network namespace     of its own, without interfaces; where the kernel lets this user have one
files (Landlock)      nothing can be created, changed or removed; read: Python's library, system libraries, its folder
system calls          by seccomp: no process, thread, program, socket, signal to others, tracing, shared memory, change
                      of a file's owner, mode, times or attributes, of other processes' limits or priority
====================  ==================================================================================

Sources: landlock(7), seccomp(2), user_namespaces(7); `struct seccomp_data` and `landlock_ruleset_attr` of the kernel.
What is not contained is in docs/tasks.md.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
import sys
import sysconfig

LAYERS = ("limits", "privileges", "network namespace", "files", "system calls")
REQUIRED = ("limits", "privileges", "files", "system calls")
"""Without a network namespace sockets are still refused as system calls."""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_CAPABILITY_VERSION_3 = 0x20080522

# Landlock: the same numbers on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ_FILE, _WRITE_FILE, _READ_DIR = 1 << 2, 1 << 1, 1 << 3
_LEAST_ABI = 3
"""Since Linux 6.2 a ruleset covers truncation, without which files outside could be emptied."""


def confine(folder: str, *, cpu_seconds: int, memory_bytes: int, strict: bool) -> dict[str, str]:
    """Take away what is listed above; name to a few words on each layer that is in force.

    Raises `OSError` where a required layer cannot be had and `strict` is set. The process must have one thread.
    """
    layers = {
        "limits": lambda: _limits(cpu_seconds, memory_bytes),
        "network namespace": _network,
        "privileges": _privileges,
        "files": lambda: _files(folder),
        "system calls": _system_calls,
    }
    in_force: dict[str, str] = {}
    for name, layer in layers.items():
        try:
            in_force[name] = layer()
        except (OSError, ValueError, AttributeError) as error:  # AttributeError: a libc without the function
            if strict and name in REQUIRED:
                raise OSError(f"{name}: {error}") from error
    return in_force


def _limits(cpu_seconds: int, memory_bytes: int) -> str:
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails with EFBIG instead of killing the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    return f"{cpu_seconds} s CPU, {memory_bytes >> 20} MiB"


def _libc() -> ctypes.CDLL:
    if not sys.platform.startswith("linux"):
        raise OSError(errno.ENOSYS, f"needs Linux, this is {sys.platform}")
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _network() -> str:
    libc = _libc()
    if libc.unshare(_CLONE_NEWNET) != 0:
        _checked(libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET))
    return "of its own"


def _privileges() -> str:
    libc = _libc()
    _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    _checked(libc.capset(header, ctypes.create_string_buffer(24)))
    _checked(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
    _checked(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    return "no capabilities, not traceable"


def _readable(folder: str) -> list[str]:
    """Python's own library (no installed packages), what dynamic linking needs, time zones, the folder."""
    paths = sysconfig.get_paths()
    return [
        folder, paths["stdlib"], paths["platstdlib"], os.path.join(sys.base_prefix, "lib"), "/lib", "/lib64",
        "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo", "/dev/urandom",
        "/dev/zero", "/dev/null",
    ]  # fmt: skip


def _files(folder: str) -> str:
    libc = _libc()
    abi = _checked(libc.syscall(_CREATE_RULESET, None, 0, 1))
    if abi < _LEAST_ABI:
        raise OSError(errno.ENOSYS, f"Landlock ABI {abi}, {_LEAST_ABI} is needed (Linux 6.2)")
    handled = (1 << (16 if abi >= 5 else 15)) - 1  # every right on files that this kernel knows
    network = 3 if abi >= 4 else 0  # bind and connect by TCP
    scoped = 3 if abi >= 6 else 0  # abstract sockets and signals to processes outside
    attributes = struct.pack("=QQQ", handled, network, scoped)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    ruleset = _checked(libc.syscall(_CREATE_RULESET, buffer, ctypes.c_size_t(len(attributes)), 0))
    for path in _readable(folder):
        _allow(libc, ruleset, path)
    _checked(libc.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)
    return f"Landlock ABI {abi}"


def _allow(libc: ctypes.CDLL, ruleset: int, path: str) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    rights = _READ_FILE | _READ_DIR if os.path.isdir(path) else _READ_FILE
    rights |= _WRITE_FILE if path == "/dev/null" else 0
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, opened), 12)
    _checked(libc.syscall(_ADD_RULE, ruleset, 1, rule, 0))
    os.close(opened)


# System calls that are refused with EPERM, by number: (x86_64, aarch64), None where an architecture has none.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # processes, threads, programs
    "fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435), "execve": (59, 221),
    "execveat": (322, 281), "unshare": (272, 97), "setns": (308, 268), "personality": (135, 92),
    # the network, and what sends around it
    "socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # other processes
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # what outlives a process, or is not counted as its memory
    "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # files: what Landlock does not cover
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "inotify_init": (253, None), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    # the machine; most need a capability as well
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443), "syslog": (103, 116),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171), "clock_adjtime": (305, 266),
    "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58), "iopl": (172, None),
    "ioperm": (173, None), "modify_ldt": (154, None), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
}  # fmt: skip

# Refused for some values of an argument only: (number on x86_64, on aarch64, which argument, values).
_FCNTL, _IOCTL = (72, 25), (16, 29)
_REFUSED_IF = (
    (_FCNTL, 1, (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX: have the kernel send signals to others
    (_IOCTL, 1, (0x8901, 0x8902, 0x5412)),  # FIOSETOWN, SIOCSPGRP, TIOCSTI: the same, and typing into a terminal
)
_PRLIMIT = (302, 261)  # allowed on the process itself only
_NEWEST = 462
"""A later system call does not exist as far as the process can tell."""

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _EQUAL, _GREATER, _AT_LEAST, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


def _system_calls() -> str:
    machine = os.uname().machine
    if machine not in _MACHINES or sys.maxsize < 1 << 32:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    program = b"".join(_filter(*_MACHINES[machine]))
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    _checked(_libc().prctl(_PR_SET_SECCOMP, 2, header, 0, 0))
    return f"seccomp, {len(_REFUSED)} refused"


def _filter(column: int, machine: int) -> list[bytes]:
    """The filter as BPF instructions: code, jump if true, jump if false, constant."""

    def op(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, true, false, value)

    refuse = op(_RETURN, _ERRNO | errno.EPERM)
    lines = [op(_LOAD, 4), op(_EQUAL, machine, true=1), op(_RETURN, _KILL)]  # calls of another architecture's table
    lines += [op(_LOAD, 0), op(_AT_LEAST, 0x40000000, false=1), op(_RETURN, _KILL)]  # the x32 table
    lines += [op(_GREATER, _NEWEST, false=1), op(_RETURN, _ERRNO | errno.ENOSYS)]
    for numbers in _REFUSED.values():
        if (number := numbers[column]) is not None:
            lines += [op(_EQUAL, number, false=1), refuse]
    for numbers, argument, values in _REFUSED_IF:
        tests = [part for value in values for part in (op(_EQUAL, value, false=1), refuse)]
        body = [op(_LOAD, 16 + 8 * argument), *tests, op(_RETURN, _ALLOW)]
        lines += [op(_EQUAL, numbers[column], false=len(body)), *body]
    own = [op(_LOAD, 16), op(_EQUAL, 0, true=1), refuse, op(_RETURN, _ALLOW)]
    return [*lines, op(_EQUAL, _PRLIMIT[column], false=len(own)), *own, op(_RETURN, _ALLOW)]
