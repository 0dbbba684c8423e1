//! A handshake over a blocking socket, within a time limit.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use super::handshake::{Handshake, HandshakeError, MESSAGE_MAX, Peer};

/// Bytes of a refused peer that are read and dropped, and how long each is waited for.
const DRAIN_MAX: usize = 1024;
const DRAIN_TIME: Duration = Duration::from_millis(100);

/// Runs a handshake over a blocking socket, within `limit` in all. The socket's time-outs are off afterwards.
///
/// # Errors
/// There is no connection: drop the socket. The other end has been told why, if that was possible.
pub fn run(
    socket: &mut TcpStream,
    mut handshake: Handshake,
    limit: Duration,
) -> Result<Peer, HandshakeError> {
    let deadline = Instant::now() + limit;
    let left = || {
        let left = deadline.saturating_duration_since(Instant::now());
        // A time-out of zero would be none.
        (!left.is_zero()).then_some(left).ok_or(HandshakeError::TimedOut)
    };
    let mut room = [0; MESSAGE_MAX];
    loop {
        socket.set_write_timeout(Some(left()?))?;
        socket.write_all(&handshake.output()).map_err(late)?;
        let wants = handshake.wants();
        if wants == 0 {
            break;
        }
        socket.set_read_timeout(Some(left()?))?;
        let got = match socket.read(&mut room[..wants]) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(late(error)),
        };
        if let Err(error) = handshake.input(&room[..got]) {
            tell_and_drain(socket, &handshake.output(), deadline);
            return Err(error);
        }
    }
    socket.set_read_timeout(None)?;
    socket.set_write_timeout(None)?;
    // Nothing is wanted and there was no error: it is done.
    handshake.finish().ok_or(HandshakeError::Malformed("unfinished"))
}

/// Says why, as far as possible. What the peer sent meanwhile is read and dropped: a socket closed with unread bytes takes
/// with it what was said last.
fn tell_and_drain(socket: &mut TcpStream, output: &[u8], deadline: Instant) {
    let mut left = DRAIN_MAX;
    let mut tell = || {
        socket.write_all(output)?;
        socket.shutdown(Shutdown::Write)?;
        let mut room = [0; 256];
        while left > 0 {
            let time = deadline.saturating_duration_since(Instant::now());
            socket.set_read_timeout(Some(time.clamp(Duration::from_millis(1), DRAIN_TIME)))?;
            match socket.read(&mut room)? {
                0 => break,
                got => left = left.saturating_sub(got),
            }
        }
        Ok(())
    };
    // It has failed already, whatever becomes of this.
    let _: io::Result<()> = tell();
}

fn late(error: io::Error) -> HandshakeError {
    match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => HandshakeError::TimedOut,
        _ => error.into(),
    }
}
