//! What a socket is told before a link runs over it.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

/// Seconds without a word after which the kernel asks whether the peer is there, and between such questions.
const KEEPALIVE_S: libc::c_int = 1;
/// Unanswered questions after which the connection ends.
const KEEPALIVE_TRIES: libc::c_int = 3;
/// How long what was sent may stay unacknowledged, milliseconds. As long as an owner waits for a replica.
const UNACKNOWLEDGED_MS: libc::c_int = 3_000;

/// No delay for small frames; a dead peer is noticed within some three seconds, whether anything was sent or not. An idle
/// link costs this process nothing: it is the kernel that asks.
///
/// # Errors
/// When the kernel refuses an option.
pub fn prepare(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    set(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, KEEPALIVE_S)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, KEEPALIVE_S)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, KEEPALIVE_TRIES)?;
    set(
        socket,
        libc::IPPROTO_TCP,
        libc::TCP_USER_TIMEOUT,
        UNACKNOWLEDGED_MS,
    )
}

fn set(socket: &TcpStream, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open, the value is an int that lives over the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
