//! The control socket: one thread for each operator's program, one line for each request.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use super::Input;
use crate::admin::{LINE_MAX, Request, Response};

/// Programs served at a time.
const CLIENTS_MAX: usize = 32;

/// A control socket; it is removed when this is dropped.
pub(super) struct Door(PathBuf);

impl Drop for Door {
    fn drop(&mut self) {
        // Somebody may have removed it already, and then there is nothing to do.
        std::fs::remove_file(&self.0).ok();
    }
}

/// Listens at `path` (mode 0600) and passes requests on.
pub(super) fn listen(path: &Path, inputs: mpsc::Sender<Input>) -> io::Result<Door> {
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another node answers there"));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    let clients = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("control".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            if clients.fetch_add(1, Ordering::Relaxed) >= CLIENTS_MAX {
                clients.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let (inputs, clients) = (inputs.clone(), Arc::clone(&clients));
            std::thread::spawn(move || {
                // A client that hangs up in the middle has not harmed anybody.
                serve(stream, &inputs).ok();
                clients.fetch_sub(1, Ordering::Relaxed);
            });
        }
    })?;
    Ok(Door(path.to_path_buf()))
}

fn serve(stream: UnixStream, inputs: &mpsc::Sender<Input>) -> io::Result<()> {
    let mut reader = BufReader::new(&stream);
    loop {
        let mut line = Vec::new();
        (&mut reader).take(LINE_MAX).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let response = match serde_json::from_slice::<Request>(&line) {
            Ok(request) => ask(request, inputs),
            Err(error) => Response::Error(format!("not a request: {error}")),
        };
        let mut answer = serde_json::to_vec(&response).map_err(io::Error::other)?;
        answer.push(b'\n');
        (&stream).write_all(&answer)?;
    }
}

fn ask(request: Request, inputs: &mpsc::Sender<Input>) -> Response {
    let gone = || Response::Error("the node is shutting down".into());
    let (sender, receiver) = mpsc::channel();
    if inputs.send(Input::Request(request, sender)).is_err() {
        return gone();
    }
    receiver.recv().unwrap_or_else(|_| gone())
}
