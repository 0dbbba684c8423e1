//! In steady state a disk allocates nothing and makes no system call but `io_uring_enter`, and that once a turn at most.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use support::{Dice, Rig};
use unibody_dataplane::buffers::BufferPool;
use unibody_dataplane::disk::faulty::FaultyDisk;
use unibody_dataplane::disk::file::DiskFile;
use unibody_dataplane::disk::memory_disk::MemoryDisk;
use unibody_dataplane::disk::null::NullDisk;
use unibody_dataplane::disk::uring::UringDisk;
use unibody_dataplane::disk::{Disk, Io};
use unibody_dataplane::memory::{Arena, Payload, Seg};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: passes everything on to the system's allocator and only counts.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's obligations.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's obligations.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const DISK: u64 = 8 << 20;
const B: u64 = 4096;

struct Load {
    pool: BufferPool,
    /// Memory as a guest's: not registered, and crooked.
    guest: Arena,
    crooked: Vec<[Seg; 2]>,
    dice: Dice,
}

impl Load {
    fn new() -> Self {
        let guest = Arena::new(64).unwrap();
        let base = guest.span().0;
        let crooked = (0..16)
            .map(|i| {
                let ptr = base.wrapping_add(i * 3 * 4096 + 100);
                [
                    Seg { ptr, len: 1000 },
                    Seg {
                        ptr: ptr.wrapping_add(1000),
                        len: 7192,
                    },
                ]
            })
            .collect();
        Load {
            pool: BufferPool::new(64, 16, 64).unwrap(),
            guest,
            crooked,
            dice: Dice(1),
        }
    }

    /// A round of every sort of I/O, 60 at a time. Returns turns and I/Os.
    fn round(&mut self, rig: &mut Rig) -> (u64, u64) {
        let (mut turns, mut ios) = (0, 0);
        let mut lent = [const { None }; 20];
        for (i, lent) in lent.iter_mut().enumerate() {
            let len = if i % 4 == 0 { 65536 } else { 4096 };
            let offset = self.dice.below(DISK / 65536) * 65536;
            let buffer = self.pool.take(offset, len).unwrap();
            let data = self.pool.payload(&buffer);
            *lent = Some(buffer);
            rig.submit(i as u64, Io::Write { offset, len, data });
            ios += 1;
        }
        for i in 0..16u64 {
            let offset = self.dice.below(DISK / B - 2) * B;
            let data = Payload::new(&self.crooked[i as usize]);
            rig.submit(
                i,
                Io::Read {
                    offset,
                    len: 8192,
                    data,
                    crcs: true,
                },
            );
            rig.submit(i, Io::Verify { offset, len: 8192 });
            let data = self.guest.payload(60);
            rig.submit(
                i,
                Io::Read {
                    offset,
                    len: 4096,
                    data,
                    crcs: true,
                },
            );
            ios += 3;
        }
        rig.submit(0, Io::WriteZeroes { offset: 0, len: 4096 });
        rig.submit(
            0,
            Io::WriteZeroes {
                offset: 65536,
                len: 65536,
            },
        );
        rig.submit(0, Io::Flush);
        ios += 3;
        while rig.disk.in_hand() > 0 {
            rig.turn();
            turns += 1;
        }
        assert_eq!(rig.done.len() as u64, ios);
        for completion in rig.done.drain(..) {
            assert!(completion.result.is_ok());
        }
        lent.into_iter()
            .flatten()
            .for_each(|buffer| self.pool.give(buffer));
        (turns, ios)
    }
}

type Named = (&'static str, Box<dyn Disk>);

fn disks() -> (tempfile::TempDir, Vec<Named>) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = |name| DiskFile::create(&dir.path().join(name), DISK).unwrap();
    let disks: Vec<Named> = vec![
        ("null", Box::new(NullDisk::new(DISK))),
        ("memory", Box::new(MemoryDisk::new(DISK).unwrap())),
        (
            "faulty, off",
            Box::new(FaultyDisk::new(Box::new(MemoryDisk::new(DISK).unwrap())).0),
        ),
        ("file", Box::new(UringDisk::new(file("a"), false).unwrap())),
        ("file, polled", Box::new(UringDisk::new(file("b"), true).unwrap())),
    ];
    (dir, disks)
}

fn rig(disk: Box<dyn Disk>, load: &Load) -> Rig {
    let mut rig = Rig::new(disk);
    let (base, bytes) = load.pool.span();
    // SAFETY: every caller keeps the load longer than the rig.
    unsafe { rig.ring.register_memory(base, bytes) };
    rig
}

#[test]
fn allocates_nothing_and_enters_once_a_turn() {
    let (_dir, disks) = disks();
    for (name, disk) in disks {
        let mut load = Load::new();
        let mut rig = rig(disk, &load);
        load.round(&mut rig);
        let before = (ALLOCATIONS.with(Cell::get), rig.ring.stats());
        let (mut turns, mut ios) = (0, 0);
        for _ in 0..20 {
            let (t, i) = load.round(&mut rig);
            turns += t;
            ios += i;
        }
        let allocations = ALLOCATIONS.with(Cell::get) - before.0;
        assert_eq!(allocations, 0, "{name}: {allocations} allocations for {ios} I/Os");
        let stats = rig.ring.stats();
        let enters = stats.enters - before.1.enters;
        assert!(
            enters <= turns,
            "{name}: {enters} io_uring_enter in {turns} turns"
        );
        match name {
            "null" | "memory" | "faulty, off" => assert_eq!(enters, 0, "{name} needs no system call"),
            "file" => assert!(stats.completions - before.1.completions >= ios && enters > 0),
            _ => {}
        }
    }
}

/// Only `io_uring_enter` and leaving are allowed; anything else kills the process.
#[cfg(target_arch = "x86_64")]
fn only_io_uring_enter() {
    const fn op(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter {
            code: code as u16,
            jt,
            jf,
            k,
        }
    }
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let mut program = [
        op(LOAD, 0, 0, 0),
        op(EQUAL, 2, 0, libc::SYS_io_uring_enter as u32),
        op(EQUAL, 1, 0, libc::SYS_exit_group as u32),
        op(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: plain flags, then a filter that is alive during the call.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter),
            0
        );
    }
}

/// Runs `body` in a child under the filter; how the child ended.
#[cfg(target_arch = "x86_64")]
fn in_jail(disk: Box<dyn Disk>, trespass: bool) -> i32 {
    let mut load = Load::new();
    // SAFETY: the child uses only what it inherited (the C library's allocator is safe to use after a fork) and leaves
    // by `_exit`.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let mut rig = rig(disk, &load);
        load.round(&mut rig);
        only_io_uring_enter();
        for _ in 0..20 {
            load.round(&mut rig);
        }
        // SAFETY: ends the child without running anything else; before that, in one test, a call that is forbidden.
        unsafe {
            if trespass {
                libc::getppid();
            }
            libc::_exit(0);
        }
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    status
}

#[cfg(target_arch = "x86_64")]
#[test]
fn makes_no_other_system_call() {
    let (_dir, disks) = disks();
    for (name, disk) in disks {
        let status = in_jail(disk, false);
        assert_eq!(
            status,
            0,
            "{name}: the child was ended by signal {}",
            libc::WTERMSIG(status)
        );
    }
    let status = in_jail(Box::new(NullDisk::new(DISK)), true);
    assert_eq!(libc::WTERMSIG(status), libc::SIGSYS, "the jail holds");
}
