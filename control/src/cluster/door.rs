//! The one port of a node: other nodes and the users of the API come by the same door.
//!
//! What begins like a handshake is one, and has to prove that it knows the cluster's token before anything else of it is
//! looked at; everything else is taken for HTTP. Each connection gets a thread until it is known what it is, for at most a
//! few seconds, and there are at most [`UNKNOWN_MAX`] of those.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use unibody_dataplane::plane::Plane;
use unibody_dataplane::wire::handshake::{self, Counts, Handshake, Local, PARAMS, Purpose};

use crate::raft::{Cluster, fill_random};

/// Most connections of which it is not known yet what they are.
const UNKNOWN_MAX: usize = 128;
/// What a connection may take to say what it is.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause after the system had no room for another connection.
const PAUSE: Duration = Duration::from_millis(50);

/// Whom connections are handed to.
pub(crate) struct Inside {
    pub(crate) cluster: Arc<Cluster>,
    pub(crate) plane: Arc<Plane>,
    /// Who this node is; the nonce is drawn anew for each connection.
    pub(crate) me: Local,
    pub(crate) http: tokio::sync::mpsc::Sender<TcpStream>,
    pub(crate) counts: Counts,
}

/// This node in a handshake of its own.
pub(crate) fn local(me: &Local) -> Local {
    let mut nonce = [0; 32];
    fill_random(&mut nonce);
    Local { nonce, ..me.clone() }
}

/// Listens until the process ends. Returns the address, for a port that the system chose.
pub(crate) fn open(listener: TcpListener, inside: Arc<Inside>) -> io::Result<SocketAddr> {
    let address = listener.local_addr()?;
    let unknown = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("door".into()).spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                std::thread::sleep(PAUSE);
                continue;
            };
            if unknown.fetch_add(1, Ordering::Relaxed) >= UNKNOWN_MAX {
                unknown.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (inside, counter) = (Arc::clone(&inside), Arc::clone(&unknown));
            let greeter = std::thread::Builder::new().name("greeter".into()).spawn(move || {
                // Whoever did not make sense has been told so or has hung up; the handshakes are counted.
                greet(stream, &inside).ok();
                counter.fetch_sub(1, Ordering::Relaxed);
            });
            if greeter.is_err() {
                unknown.fetch_sub(1, Ordering::Relaxed);
            }
        }
    })?;
    Ok(address)
}

fn greet(mut stream: TcpStream, inside: &Inside) -> io::Result<()> {
    if !is_node(&stream)? {
        stream.set_read_timeout(None)?;
        // Full: the users come faster than they are served.
        return inside.http.try_send(stream).map_err(io::Error::other);
    }
    let serves = [(Purpose::Control, [0; PARAMS]), (Purpose::Data, [0; PARAMS])];
    let shaken = handshake::run(
        &mut stream,
        Handshake::listen(local(&inside.me), &serves),
        PATIENCE,
    );
    inside.counts.count(&shaken);
    let Ok(peer) = shaken else { return Ok(()) };
    stream.set_read_timeout(None)?;
    stream.set_write_timeout(None)?;
    match peer.purpose {
        Purpose::Control => inside.cluster.accept(stream, peer),
        Purpose::Data => inside.plane.accept(stream, peer)?,
    }
    Ok(())
}

/// Whether the connection begins like a handshake. Leaves all bytes where they are.
fn is_node(stream: &TcpStream) -> io::Result<bool> {
    let end = Instant::now() + PATIENCE;
    let mut head = [0; handshake::MAGIC.len()];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.peek(&mut head)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n if head[..n] != handshake::MAGIC[..n] => return Ok(false),
            n if n == head.len() => return Ok(true),
            // The rest is on its way.
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}
