"""The system calls that a sandboxed program may make: an allow-list, assembled here into a kernel filter.

Standard library only, because this file is also read inside the sandbox. The filter is classic BPF (linux/seccomp.h):
each instruction is (code, jump if true, jump if false, constant) in 8 bytes, and it reads the system call's number and
arguments. What is not listed fails with "operation not permitted", an ordinary exception to an honest program.

Left out on purpose: every call that starts a process or a program (fork, execve), reaches another one (ptrace,
process_vm_readv, pidfd_*), opens a socket, mounts, changes limits or privileges, or takes memory that the address-space
limit does not count (memfd_create, shmget).
"""

import ctypes
import functools
import platform
import struct

_X86_64 = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23,
    "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35,
    "getitimer": 36, "alarm": 37, "setitimer": 38, "getpid": 39, "sendfile": 40, "recvfrom": 45,
    "shutdown": 48, "getsockname": 51, "exit": 60, "uname": 63, "flock": 73, "fsync": 74,
    "fdatasync": 75, "truncate": 76, "ftruncate": 77, "getdents": 78, "getcwd": 79, "chdir": 80, "fchdir": 81,
    "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "unlink": 87, "symlink": 88, "readlink": 89, "chmod": 90,
    "fchmod": 91, "umask": 95, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "times": 100,
    "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "rt_sigpending": 127,
    "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131, "statfs": 137, "fstatfs": 138, "gettid": 186,
    "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218,
    "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231,
    "epoll_wait": 232, "epoll_ctl": 233, "openat": 257, "mkdirat": 258, "newfstatat": 262, "unlinkat": 263,
    "renameat": 264, "symlinkat": 266, "readlinkat": 267, "fchmodat": 268, "faccessat": 269, "pselect6": 270,
    "ppoll": 271, "set_robust_list": 273, "utimensat": 280, "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291,
    "dup3": 292, "pipe2": 293, "getcpu": 309, "renameat2": 316, "getrandom": 318, "statx": 332, "rseq": 334,
    "close_range": 436, "faccessat2": 439,
}  # fmt: skip
_AARCH64 = {
    "getcwd": 17, "eventfd2": 19, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "dup": 23, "dup3": 24,
    "flock": 32, "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "renameat": 38, "statfs": 43,
    "fstatfs": 44, "truncate": 45, "ftruncate": 46, "faccessat": 48, "chdir": 49, "fchdir": 50, "fchmod": 52,
    "fchmodat": 53, "openat": 56, "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62, "read": 63, "write": 64,
    "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68, "sendfile": 71, "pselect6": 72, "ppoll": 73,
    "readlinkat": 78, "newfstatat": 79, "fstat": 80, "fsync": 82, "fdatasync": 83, "utimensat": 88, "exit": 93,
    "exit_group": 94, "set_tid_address": 96, "futex": 98, "set_robust_list": 99, "nanosleep": 101, "getitimer": 102,
    "setitimer": 103, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123,
    "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigsuspend": 133, "rt_sigaction": 134,
    "rt_sigprocmask": 135, "rt_sigpending": 136, "rt_sigtimedwait": 137, "rt_sigreturn": 139, "times": 153,
    "uname": 160, "getrlimit": 163, "getrusage": 165, "umask": 166, "getcpu": 168, "gettimeofday": 169, "getpid": 172,
    "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179,
    "getsockname": 204, "recvfrom": 207, "shutdown": 210, "brk": 214, "munmap": 215, "mremap": 216,
    "mmap": 222, "mprotect": 226, "madvise": 233, "renameat2": 276, "getrandom": 278, "statx": 291, "rseq": 293,
    "close_range": 436, "faccessat2": 439,
}  # fmt: skip

# those that are allowed with some arguments only
_CONDITIONAL = {
    "x86_64": {
        "clone": 56,
        "clone3": 435,
        "kill": 62,
        "tgkill": 234,
        "ioctl": 16,
        "fcntl": 72,
        "prlimit64": 302,
        "socketpair": 53,
        "sendto": 44,
    },
    "aarch64": {
        "clone": 220,
        "clone3": 435,
        "kill": 129,
        "tgkill": 131,
        "ioctl": 29,
        "fcntl": 25,
        "prlimit64": 261,
        "socketpair": 199,
        "sendto": 206,
    },
}
_TABLES = {"x86_64": _X86_64, "aarch64": _AARCH64}
_REACHING = {"x86_64": (41, 53, 425), "aarch64": (198, 199, 425)}
"""Those by which a process comes by a socket: socket, socketpair, io_uring_setup."""
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL_PROCESS = 0x7FFF0000, 0x80000000
_EPERM, _ENOTTY, _ENOSYS = 0x00050000 | 1, 0x00050000 | 25, 0x00050000 | 38
_NUMBER, _ARCHITECTURE = 0, 4
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000
_IOCTLS = (0x5451, 0x5450, 0x5421, 0x541B)  # set and clear close-on-exec, do not block, count what waits
# duplicate, close-on-exec, status, locks, size of a pipe; not F_SETOWN and its like: the kernel would signal others
_FCNTLS = (*range(8), 36, 37, 38, 1030, 1032)
_AF_UNIX = 1
_OWN_PID = b"\xfe\xed\xfa\xce"

SUPPORTED = platform.machine() in _TABLES
"""Whether this processor's system calls are tabled here."""


def assemble(pid: int, machine: str = "") -> bytes:
    """The filter for the process `pid` (which may signal itself and nobody else), 8 bytes an instruction."""
    return _template(machine or platform.machine()).replace(_OWN_PID, pid.to_bytes(4, "little"))


@functools.cache
def _template(machine: str) -> bytes:
    """The filter with a placeholder for the process id, made once by the fork-server."""
    if machine not in _TABLES:
        raise OSError(f"no table of system calls for {machine}: the sandbox knows {', '.join(_TABLES)}")
    special = _CONDITIONAL[machine]
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _AUDIT_ARCH[machine]), (_RETURN, 0, 0, _KILL_PROCESS)]
    program.append((_LOAD, 0, 0, _NUMBER))
    for number in _TABLES[machine].values():
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    program += _when(special["clone"], [(_LOAD, 0, 0, _low(0)), (_ANY_BIT, 0, 1, _CLONE_THREAD)], _EPERM)
    # the C library falls back to clone, whose flags are readable here, only where clone3 does not exist
    program += [(_EQUAL, 0, 1, special["clone3"]), (_RETURN, 0, 0, _ENOSYS)]
    for name in ("kill", "tgkill"):
        program += _when(
            special[name], [(_LOAD, 0, 0, _low(0)), (_EQUAL, 0, 1, int.from_bytes(_OWN_PID, "little"))], _EPERM
        )
    for name, codes, refusal in (("ioctl", _IOCTLS, _ENOTTY), ("fcntl", _FCNTLS, _EPERM)):
        choices = [instruction for code in codes for instruction in ((_EQUAL, 0, 1, code), (_RETURN, 0, 0, _ALLOW))]
        program += _when(special[name], [(_LOAD, 0, 0, _low(1)), *choices[:-1]], refusal)
    program += _when(special["prlimit64"], _null(2), _EPERM)  # reading limits: the pointer to new ones is null
    program += _when(special["sendto"], _null(4), _EPERM)  # to the other end of a pair: there is no address
    program += _when(special["socketpair"], [(_LOAD, 0, 0, _low(0)), (_EQUAL, 0, 1, _AF_UNIX)], _EPERM)
    program.append((_RETURN, 0, 0, _EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def without_sockets(machine: str = "") -> bytes:
    """The filter for a process that may do anything but open a socket: those of the host that lie in its files can be
    reached from a network name space of one's own, and on a file system that is mounted read-only."""
    machine = machine or platform.machine()
    program = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _AUDIT_ARCH[machine]), (_RETURN, 0, 0, _KILL_PROCESS)]
    program += [(_LOAD, 0, 0, _NUMBER), (_ANY_BIT, 0, 1, _X32), (_RETURN, 0, 0, _EPERM)]
    for number in _REACHING[machine]:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


def _low(argument: int) -> int:
    """Where the low 32 bits of an argument lie (both machines are little-endian)."""
    return 16 + 8 * argument


def _null(argument: int) -> list[tuple[int, int, int, int]]:
    """Whether a pointer among the arguments is null, as a test for `_when`."""
    low = _low(argument)
    return [(_LOAD, 0, 0, low), (_EQUAL, 0, 3, 0), (_LOAD, 0, 0, low + 4), (_EQUAL, 0, 1, 0)]


def _when(number: int, test: list[tuple[int, int, int, int]], refusal: int) -> list[tuple[int, int, int, int]]:
    """For this call alone: `test` falls through to "allow" or jumps one past it, to `refusal`."""
    body = [*test, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, refusal)]
    return [(_EQUAL, 0, len(body), number), *body]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


_LIBC = ctypes.CDLL(None, use_errno=True)
_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER_MODE = 38, 22, 2


def confine(instructions: bytes) -> None:
    """Put the filter on this process, for good."""
    program = _Program(len(instructions) // 8, instructions)
    zero = ctypes.c_ulong(0)
    if _LIBC.prctl(_NO_NEW_PRIVS, ctypes.c_ulong(1), zero, zero, zero) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs was refused")
    if _LIBC.prctl(_SET_SECCOMP, ctypes.c_ulong(_FILTER_MODE), ctypes.byref(program), zero, zero) != 0:
        raise OSError(ctypes.get_errno(), "the seccomp filter was refused")


def drop_capabilities() -> None:
    """Give up every capability; without exec there is no way back."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    none = (ctypes.c_uint32 * 6)()
    if _LIBC.capset(ctypes.byref(header), ctypes.byref(none)) != 0:
        raise OSError(ctypes.get_errno(), "capabilities could not be dropped")


def mount_scratch(path: str, size_bytes: int, files: int) -> None:
    """An empty file system in memory of bounded size and number of files."""
    options = f"size={max(size_bytes, 4096)},nr_inodes={files},mode=0700".encode()
    no_devices_or_programs = 2 | 4 | 8  # nosuid, nodev, noexec
    if _LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", ctypes.c_ulong(no_devices_or_programs), options) != 0:
        raise OSError(ctypes.get_errno(), f"no scratch space could be mounted at {path}")


def unmount(path: str) -> None:
    """Throw a scratch file system away, whatever lies in it."""
    detach = 2
    if _LIBC.umount2(path.encode(), detach) != 0:
        raise OSError(ctypes.get_errno(), f"{path} could not be unmounted")
