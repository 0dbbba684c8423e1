//! A look at a volume's data plane before a VMM is pointed at it.
//!
//! QEMU waits without end for a socket that nobody serves, and neither VMM can make a vhost-user disk read-only; so both are
//! checked here, with errors that say so. The look is one connection that speaks at most one message of the vhost-user
//! protocol (GET_FEATURES) and closes: a back end takes that for a VMM that came and went.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::{VmmError, VolumeSpec};

/// How long a data plane has to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// vhost-user request code.
const GET_FEATURES: u32 = 1;
/// vhost-user message flags: protocol version 1, and the bit that marks a reply.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
/// virtio-blk feature bit: the device is read-only.
const VIRTIO_BLK_F_RO: u64 = 1 << 5;

/// Makes sure that something serves this volume, and serves it read-only if that was asked.
pub(crate) fn check(volume: &VolumeSpec) -> Result<(), VmmError> {
    let fail = |problem| VmmError::Volume {
        volume: volume.name.clone(),
        problem,
    };
    let mut stream = UnixStream::connect(&volume.socket).map_err(|error| {
        fail(format!(
            "nothing serves it on {} ({error}); start its data plane (`unibody serve`) or correct the socket",
            volume.socket.display()
        ))
    })?;
    if !volume.readonly {
        return Ok(());
    }
    let features = features(&mut stream).map_err(|error| {
        fail(format!(
            "{} does not answer like a vhost-user back end ({error})",
            volume.socket.display()
        ))
    })?;
    if features & VIRTIO_BLK_F_RO == 0 {
        return Err(fail(
            "is to be read-only, but its data plane serves it writable; serve it read-only".to_owned(),
        ));
    }
    Ok(())
}

fn features(stream: &mut UnixStream) -> std::io::Result<u64> {
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    let request: Vec<u8> = [GET_FEATURES, VERSION, 0]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    stream.write_all(&request)?;
    let mut reply = [0; 20];
    stream.read_exact(&mut reply)?;
    let (header, payload) = reply.split_at(12);
    let expected: Vec<u8> = [GET_FEATURES, VERSION | REPLY, 8]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    match <[u8; 8]>::try_from(payload) {
        Ok(bytes) if header == expected => Ok(u64::from_le_bytes(bytes)),
        _ => Err(std::io::Error::other("unexpected reply")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn volume(dir: &std::path::Path, readonly: bool) -> VolumeSpec {
        VolumeSpec {
            name: "v".to_owned(),
            socket: dir.join("s"),
            queues: 1,
            readonly,
        }
    }

    fn serve_once(dir: &std::path::Path, reply: Vec<u8>) -> std::thread::JoinHandle<()> {
        let listener = UnixListener::bind(dir.join("s")).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 12];
            stream.read_exact(&mut request).unwrap();
            assert_eq!(request, [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
            stream.write_all(&reply).unwrap();
        })
    }

    fn reply(features: u64) -> Vec<u8> {
        [&[1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0][..], &features.to_le_bytes()].concat()
    }

    #[test]
    fn a_socket_that_nobody_serves_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = check(&volume(dir.path(), false)).unwrap_err().to_string();
        assert!(error.contains("unibody serve"), "{error}");
        drop(UnixListener::bind(dir.path().join("s")).unwrap());
        check(&volume(dir.path(), false)).expect_err("a socket file without a listener");
    }

    #[test]
    fn read_only_is_believed_only_when_the_data_plane_says_so() {
        for (answer, says) in [
            (reply(VIRTIO_BLK_F_RO | 1), None),
            (reply(!VIRTIO_BLK_F_RO), Some("serves it writable")),
            (reply(u64::MAX)[..19].to_vec(), Some("does not answer")),
            (vec![0; 20], Some("does not answer")),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let server = serve_once(dir.path(), answer);
            let result = check(&volume(dir.path(), true));
            server.join().unwrap();
            match says {
                None => result.unwrap(),
                Some(text) => assert!(result.unwrap_err().to_string().contains(text)),
            }
        }
    }
}
