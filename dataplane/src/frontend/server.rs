//! A device's socket: accepts one front end at a time and serves it until it hangs up, then waits for the next.
//!
//! One thread with a small stack for each device: a front end that sends half a message holds up only itself. The socket
//! has mode 0600 from before it accepts; a stale socket file is replaced only if nobody listens on it.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost::vhost_user::{BackendReqHandler, Error};

use super::session::Session;
use super::{DeviceConfig, DeviceId, Plane, QUEUE_SIZE_MAX, QUEUES_MAX, SECTOR, Shared, count};

/// Stack of a session's thread, bytes; only what is touched costs memory.
const STACK_BYTES: usize = 128 << 10;
/// Least time between two reports about a device.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Time between two attempts to accept after one failed (out of descriptors, say).
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

const SET_BACKEND_REQ_FD: u32 = 21;
const CONFIG_CHANGE_MSG: u32 = 2;
const HEADER_BYTES: usize = 12;
const FLAG_VERSION: u32 = 1;
const FLAG_REPLY: u32 = 4;
const FLAG_NEED_REPLY: u32 = 8;

/// Why a device can not be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A property is out of range.
    #[error("{0}")]
    Config(&'static str),
    /// Somebody serves there already.
    #[error("another process is listening on {0}: stop it, or choose another path")]
    InUse(PathBuf),
    /// It is something else than a socket.
    #[error("{0} exists and is not a socket: remove it, or choose another path")]
    NotASocket(PathBuf),
    /// The kernel refused.
    #[error("can not serve on {path}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// What a device's thread, its session and its owner share.
pub(crate) struct Channel {
    device: DeviceId,
    plane: Arc<dyn Plane>,
    /// The present connection, to end it from outside.
    connection: Mutex<Option<UnixStream>>,
    /// The way back to the front end.
    back: Mutex<Option<UnixStream>>,
    last_report: Mutex<Option<Instant>>,
    stopping: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Channel {
    /// Tells the operator, unless something was told a moment ago: a front end must not be able to flood the log.
    pub(crate) fn report(&self, message: &str) {
        let mut last = lock(&self.last_report);
        let now = Instant::now();
        if last.is_none_or(|last| now.duration_since(last) >= REPORT_EVERY) {
            *last = Some(now);
            self.plane.report(self.device, message);
        }
    }
}

/// An exported device. Dropping it stops serving and removes the socket.
pub struct Export {
    path: PathBuf,
    listener: Arc<UnixListener>,
    shared: Arc<Shared>,
    channel: Arc<Channel>,
    thread: Option<JoinHandle<()>>,
}

impl Export {
    /// Serves a device on a new socket at `path`.
    ///
    /// # Errors
    /// When the configuration is impossible or the socket can not be made.
    pub fn new(
        device: DeviceId,
        config: DeviceConfig,
        path: &Path,
        plane: Arc<dyn Plane>,
    ) -> Result<Self, ServeError> {
        check(&config)?;
        let io = |source| ServeError::Io {
            path: path.to_owned(),
            source,
        };
        let listener = Arc::new(listen(path)?);
        let shared = Arc::new(Shared::new(config));
        let channel = Arc::new(Channel {
            device,
            plane: Arc::clone(&plane),
            connection: Mutex::new(None),
            back: Mutex::new(None),
            last_report: Mutex::new(None),
            stopping: AtomicBool::new(false),
        });
        let thread = {
            let (listener, shared, channel) =
                (Arc::clone(&listener), Arc::clone(&shared), Arc::clone(&channel));
            std::thread::Builder::new()
                .name(format!("device{}", device.0))
                .stack_size(STACK_BYTES)
                .spawn(move || accept_loop(&listener, &shared, &channel))
                .map_err(io)?
        };
        Ok(Export {
            path: path.to_owned(),
            listener,
            shared,
            channel,
            thread: Some(thread),
        })
    }

    /// Size, cache mode and counters.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// The device has `bytes` bytes from now on; a connected front end that can be told is told. Call it after the volume
    /// has grown; it is rounded down to sectors.
    pub fn resize(&self, bytes: u64) {
        self.shared.set_capacity(bytes / SECTOR * SECTOR);
        let mut message = [0u8; HEADER_BYTES];
        message[..4].copy_from_slice(&CONFIG_CHANGE_MSG.to_le_bytes());
        message[4..8].copy_from_slice(&FLAG_VERSION.to_le_bytes());
        let mut back = lock(&self.channel.back);
        if let Some(stream) = &mut *back
            && stream.write_all(&message).is_err()
        {
            // It does not read, or is gone: a front end that does not listen is not waited for.
            *back = None;
            self.channel
                .report("the front end did not take the notice of a new size");
        }
    }

    /// A front end is connected.
    pub fn connected(&self) -> bool {
        lock(&self.channel.connection).is_some()
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.channel.stopping.store(true, Ordering::Release);
        // SAFETY: a system call on our own open socket; it wakes the thread out of accept.
        unsafe { libc::shutdown(self.listener.as_raw_fd(), libc::SHUT_RDWR) };
        if let Some(connection) = &*lock(&self.channel.connection) {
            let _ = connection.shutdown(std::net::Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

fn check(config: &DeviceConfig) -> Result<(), ServeError> {
    let refuse = |why| Err(ServeError::Config(why));
    if !config.capacity_bytes.is_multiple_of(SECTOR) {
        return refuse("the size of a device must be a multiple of 512 bytes");
    }
    if !(1..=QUEUES_MAX).contains(&config.queues_max) {
        return refuse("a device has 1 to 64 queues");
    }
    if !config.queue_size_max.is_power_of_two() || config.queue_size_max > QUEUE_SIZE_MAX {
        return refuse("the size of a queue is a power of two up to 1024");
    }
    Ok(())
}

/// A listening socket of mode 0600 at `path`.
fn listen(path: &Path) -> Result<UnixListener, ServeError> {
    let io = |source| ServeError::Io {
        path: path.to_owned(),
        source,
    };
    match std::fs::symlink_metadata(path) {
        Err(gone) if gone.kind() == io::ErrorKind::NotFound => {}
        Err(other) => return Err(io(other)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(ServeError::NotASocket(path.to_owned())),
        Ok(_) => match UnixStream::connect(path) {
            Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(io)?;
            }
            Err(gone) if gone.kind() == io::ErrorKind::NotFound => {}
            Ok(_) => return Err(ServeError::InUse(path.to_owned())),
            Err(other) => return Err(io(other)),
        },
    }
    // SAFETY: an all-zero sockaddr_un is valid.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a socket's path has at most 107 bytes",
        )));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let last = |failed: bool| {
        if failed {
            Err(io(io::Error::last_os_error()))
        } else {
            Ok(())
        }
    };
    // SAFETY: makes a new descriptor, checked below.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    last(fd < 0)?;
    // SAFETY: nobody else owns the new descriptor.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // The mode is set between bind and listen: nobody can connect in between.
    // SAFETY: the address is valid for its whole length.
    let bound = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_un>() as libc::socklen_t,
        )
    };
    last(bound != 0)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(io)?;
    // SAFETY: a system call on our own descriptor.
    last(unsafe { libc::listen(fd.as_raw_fd(), 4) } != 0)?;
    Ok(UnixListener::from(fd))
}

fn accept_loop(listener: &UnixListener, shared: &Arc<Shared>, channel: &Arc<Channel>) {
    while !channel.stopping.load(Ordering::Acquire) {
        match listener.accept() {
            Ok((stream, _)) => serve(stream, shared, channel),
            Err(_) if channel.stopping.load(Ordering::Acquire) => break,
            Err(error) => {
                channel.report(&format!("accepting a front end failed: {error}"));
                std::thread::sleep(ACCEPT_AGAIN);
            }
        }
    }
}

/// Serves one front end until it hangs up or misbehaves.
fn serve(stream: UnixStream, shared: &Arc<Shared>, channel: &Arc<Channel>) {
    let Ok(clone) = stream.try_clone() else {
        return channel.report("out of file descriptors: a front end was turned away");
    };
    *lock(&channel.connection) = Some(clone);
    if channel.stopping.load(Ordering::Acquire) {
        return;
    }
    count(&shared.counters.connections);
    let session = Session::new(
        channel.device,
        Arc::clone(shared),
        Arc::clone(&channel.plane),
        Arc::clone(channel),
    );
    let session = Arc::new(Mutex::new(session));
    let fd = stream.as_raw_fd();
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&session));
    loop {
        let handled = match take_back_channel(fd, &session, channel) {
            Ok(true) => continue,
            Ok(false) => handler.handle_request(),
            Err(error) => Err(Error::SocketError(error)),
        };
        match handled {
            Ok(()) => {}
            Err(_) if std::mem::take(&mut lock(&session).tolerable) => {
                count(&shared.counters.messages_refused)
            }
            Err(Error::Disconnected) => break,
            Err(error) => {
                count(&shared.counters.messages_refused);
                channel.report(&format!("connection closed: {error}"));
                break;
            }
        }
    }
    *lock(&channel.back) = None;
    // Queues are stopped before the front end can see the connection closed: it may reuse its memory then.
    drop(session);
    drop(handler);
    *lock(&channel.connection) = None;
}

/// Handles the one message whose descriptor the vhost crate would hide from us: the socket for messages to the front
/// end. True if it was that.
fn take_back_channel(fd: RawFd, session: &Mutex<Session>, channel: &Channel) -> io::Result<bool> {
    let mut header = [0u8; HEADER_BYTES];
    // SAFETY: receives into a buffer of that length; the descriptor is the handler's and open.
    let peeked = unsafe { libc::recv(fd, header.as_mut_ptr().cast(), header.len(), libc::MSG_PEEK) };
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    if peeked != HEADER_BYTES as isize || word(0) != SET_BACKEND_REQ_FD || word(8) != 0 {
        return Ok(false);
    }
    let back = receive_fd(fd, &mut header)?;
    let session = lock(session);
    let Some(back) = back.filter(|_| session.wants_back_channel()) else {
        return Err(io::Error::other(
            "a back channel without socket, or not negotiated",
        ));
    };
    let stream = UnixStream::from(back);
    stream.set_write_timeout(Some(Duration::from_millis(10)))?;
    *lock(&channel.back) = Some(stream);
    let flags = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
    if flags & FLAG_NEED_REPLY != 0 && session.acknowledges() {
        let mut reply = [0u8; HEADER_BYTES + 8];
        reply[..4].copy_from_slice(&SET_BACKEND_REQ_FD.to_le_bytes());
        reply[4..8].copy_from_slice(&(FLAG_VERSION | FLAG_REPLY).to_le_bytes());
        reply[8..12].copy_from_slice(&8u32.to_le_bytes());
        // SAFETY: sends a buffer of that length; no signal if the front end is gone.
        let sent = unsafe { libc::send(fd, reply.as_ptr().cast(), reply.len(), libc::MSG_NOSIGNAL) };
        if sent != reply.len() as isize {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(true)
}

/// Receives a header and the one descriptor that came with it.
fn receive_fd(fd: RawFd, header: &mut [u8; HEADER_BYTES]) -> io::Result<Option<OwnedFd>> {
    let mut vector = libc::iovec {
        iov_base: header.as_mut_ptr().cast(),
        iov_len: header.len(),
    };
    // Room for one descriptor, aligned for a control message; the kernel closes what does not fit.
    let mut control = [0u64; 4];
    // SAFETY: an all-zero msghdr is valid.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    // SAFETY: computes a length.
    message.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<RawFd>() as u32) } as usize;
    // SAFETY: all buffers named in the message are alive and as long as it says.
    let n = unsafe { libc::recvmsg(fd, &mut message, libc::MSG_CMSG_CLOEXEC) };
    if n < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel filled in the control buffer; the macros stay inside its length.
    unsafe {
        let first = libc::CMSG_FIRSTHDR(&message);
        let is_fd = !first.is_null()
            && (*first).cmsg_level == libc::SOL_SOCKET
            && (*first).cmsg_type == libc::SCM_RIGHTS
            && (*first).cmsg_len >= libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
        if !is_fd {
            return Ok(None);
        }
        Ok(Some(OwnedFd::from_raw_fd(
            libc::CMSG_DATA(first).cast::<RawFd>().read_unaligned(),
        )))
    }
}
