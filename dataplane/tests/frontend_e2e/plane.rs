//! A data plane for tests: one polling thread, and a vector of bytes as the disk.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use unibody_dataplane::frontend::{Completion, DeviceId, Kind, Plane, Queue, Request, SECTOR};

enum Command {
    Start(DeviceId, u16, Box<Queue>),
    Stop(DeviceId, u16, Sender<Option<Queue>>),
    End,
}

/// What the polling thread does with requests, and what tests look at.
pub(crate) struct Control {
    /// Complete reads and writes without touching data.
    pub(crate) null: bool,
    /// Take requests, but complete none.
    pub(crate) hold: AtomicBool,
    /// Requests taken so far.
    pub(crate) taken: AtomicUsize,
    pub(crate) data: Mutex<Vec<u8>>,
    pub(crate) reports: Mutex<Vec<String>>,
}

/// Hands queues to the polling thread.
pub(crate) struct TestPlane {
    pub(crate) control: Arc<Control>,
    commands: Mutex<Sender<Command>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl TestPlane {
    pub(crate) fn new(bytes: usize, null: bool) -> Arc<Self> {
        let control = Arc::new(Control {
            null,
            hold: AtomicBool::new(false),
            taken: AtomicUsize::new(0),
            data: Mutex::new(vec![0; if null { 0 } else { bytes }]),
            reports: Mutex::default(),
        });
        let (tx, rx) = channel();
        let thread = {
            let control = Arc::clone(&control);
            std::thread::spawn(move || poll_loop(&control, &rx))
        };
        Arc::new(TestPlane {
            control,
            commands: Mutex::new(tx),
            thread: Mutex::new(Some(thread)),
        })
    }

    fn send(&self, command: Command) {
        let _ = self.commands.lock().unwrap().send(command);
    }
}

impl Drop for TestPlane {
    fn drop(&mut self) {
        self.send(Command::End);
        if let Some(thread) = self.thread.lock().unwrap().take() {
            thread.join().unwrap();
        }
    }
}

impl Plane for TestPlane {
    fn start_queue(&self, device: DeviceId, index: u16, queue: Queue) {
        self.send(Command::Start(device, index, Box::new(queue)));
    }

    fn stop_queue(&self, device: DeviceId, index: u16) -> Option<Queue> {
        let (tx, rx) = channel();
        self.send(Command::Stop(device, index, tx));
        rx.recv().ok().flatten()
    }

    fn report(&self, _device: DeviceId, message: &str) {
        self.control.reports.lock().unwrap().push(message.to_owned());
    }
}

struct Running {
    queue: Box<Queue>,
    held: Vec<Request>,
}

fn ring(fd: RawFd) {
    let one = 1u64.to_ne_bytes();
    // SAFETY: writes eight bytes of our own to an open eventfd.
    assert_eq!(unsafe { libc::write(fd, one.as_ptr().cast(), 8) }, 8);
}

fn poll_loop(control: &Control, commands: &Receiver<Command>) {
    let mut queues: BTreeMap<(DeviceId, u16), Running> = BTreeMap::new();
    let mut idle = 0u32;
    loop {
        idle += 1;
        // A hundred polls between two looks at the mailbox cost nobody anything.
        if idle.is_multiple_of(128) || queues.is_empty() {
            match commands.try_recv() {
                Ok(Command::Start(device, index, queue)) => {
                    let held = Vec::with_capacity(1024);
                    assert!(queues.insert((device, index), Running { queue, held }).is_none());
                }
                Ok(Command::Stop(device, index, reply)) => {
                    let running = queues.remove(&(device, index));
                    let _ = reply.send(running.map(|running| drain(control, running)));
                }
                Ok(Command::End) => return,
                Err(_) if queues.is_empty() => std::thread::sleep(std::time::Duration::from_micros(200)),
                Err(_) => {}
            }
        }
        let hold = control.hold.load(Ordering::Relaxed);
        let mut any = 0;
        for running in queues.values_mut() {
            any += running.queue.poll(128, |request| running.held.push(request));
            if !hold {
                finish(control, running);
            }
            running.queue.keep_disarmed();
            if let Some(fd) = running.queue.publish() {
                ring(fd);
            }
        }
        if any > 0 {
            control.taken.fetch_add(any, Ordering::Relaxed);
        } else if !control.null {
            // Tests share two cores; the speed test does not yield.
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
}

fn drain(control: &Control, mut running: Running) -> Queue {
    while control.hold.load(Ordering::Relaxed) && !running.held.is_empty() {
        std::thread::yield_now();
    }
    finish(control, &mut running);
    if let Some(fd) = running.queue.publish() {
        ring(fd);
    }
    assert_eq!(running.queue.in_flight(), 0);
    *running.queue
}

fn finish(control: &Control, running: &mut Running) {
    for request in running.held.drain(..) {
        if !control.null {
            execute(&mut control.data.lock().unwrap(), &mut running.queue, &request);
        }
        running.queue.complete(request.head, Completion::Ok);
    }
}

fn execute(data: &mut [u8], queue: &mut Queue, request: &Request) {
    let mut at = (request.sector * SECTOR) as usize;
    match request.kind {
        Kind::In | Kind::Out => {
            let mut total = 0;
            for seg in queue.segs(request) {
                let len = seg.len as usize;
                let disk = data[at..at + len].as_mut_ptr();
                // SAFETY: the segment is guest memory that stays mapped until the request is completed.
                unsafe {
                    match request.kind {
                        Kind::In => std::ptr::copy_nonoverlapping(disk, seg.ptr, len),
                        _ => std::ptr::copy_nonoverlapping(seg.ptr, disk, len),
                    }
                }
                at += len;
                total += len;
            }
            assert_eq!(total, request.len as usize);
        }
        Kind::Flush => {}
        Kind::Discard | Kind::WriteZeroes => {
            for range in queue.ranges(request) {
                let at = (range.sector * SECTOR) as usize;
                data[at..at + range.sectors as usize * SECTOR as usize].fill(0);
            }
        }
    }
}
