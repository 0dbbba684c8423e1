//! Messages on an authenticated connection: length, proof, bytes.
//!
//! Each frame carries BLAKE3, keyed with the connection's secret, over its direction, its number, its length and its bytes:
//! nothing that was not sent by the proven peer, in this order, on this connection, is handed on.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use unibody_dataplane::wire::handshake::SessionKey;

/// Longest frame, bytes.
pub(super) const FRAME_MAX: usize = 32 << 20;
const MAC: usize = 32;
/// Bytes for which room is made before any of them has come.
const STEP: usize = 1 << 20;

/// Which end of the connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Dialer,
    Listener,
}

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Link<S> {
    stream: S,
    key: SessionKey,
    end: End,
    sent: u64,
    received: u64,
}

fn wrong(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl<S: AsyncRead + AsyncWrite + Unpin> Link<S> {
    pub(super) fn new(stream: S, key: SessionKey, end: End) -> Self {
        Link {
            stream,
            key,
            end,
            sent: 0,
            received: 0,
        }
    }

    fn proof(&self, from: End, number: u64, bytes: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key.0);
        hasher.update(match from {
            End::Dialer => b"D",
            End::Listener => b"L",
        });
        hasher.update(&number.to_le_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
        hasher.finalize()
    }

    /// Sends one frame. After an error, or if it is not waited for, the connection is of no use any more.
    pub(super) async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() > FRAME_MAX {
            return Err(wrong("the message is longer than 32 MiB"));
        }
        let proof = self.proof(self.end, self.sent, bytes);
        self.sent += 1;
        let mut head = [0; 4 + MAC];
        head[..4].copy_from_slice(&(bytes.len() as u32).to_le_bytes());
        head[4..].copy_from_slice(proof.as_bytes());
        self.stream.write_all(&head).await?;
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// The next frame. After an error, or if it is not waited for, the connection is of no use any more.
    pub(super) async fn receive(&mut self) -> io::Result<Vec<u8>> {
        let mut head = [0; 4 + MAC];
        self.stream.read_exact(&mut head).await?;
        let [a, b, c, d, proof @ ..] = head;
        let len = u32::from_le_bytes([a, b, c, d]) as usize;
        if len > FRAME_MAX {
            return Err(wrong("a frame longer than 32 MiB"));
        }
        let mut bytes = Vec::new();
        while bytes.len() < len {
            let have = bytes.len();
            bytes.resize(len.min(have + STEP), 0);
            self.stream.read_exact(&mut bytes[have..]).await?;
        }
        let from = match self.end {
            End::Dialer => End::Listener,
            End::Listener => End::Dialer,
        };
        // Comparing hashes of blake3 takes the same time wherever they differ.
        if self.proof(from, self.received, &bytes) != blake3::Hash::from_bytes(proof) {
            return Err(wrong("a frame that the peer did not send"));
        }
        self.received += 1;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: SessionKey = SessionKey([7; 32]);

    /// What one end sends, as bytes.
    async fn sent(messages: &[&[u8]]) -> Vec<u8> {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let mut link = Link::new(ours, KEY, End::Dialer);
        for message in messages {
            link.send(message).await.unwrap();
        }
        drop(link);
        let mut bytes = Vec::new();
        theirs.read_to_end(&mut bytes).await.unwrap();
        bytes
    }

    async fn received(bytes: &[u8], end: End, key: SessionKey, count: usize) -> Vec<io::Result<Vec<u8>>> {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        theirs.write_all(bytes).await.unwrap();
        drop(theirs);
        let mut link = Link::new(ours, key, end);
        let mut all = Vec::new();
        for _ in 0..count {
            all.push(link.receive().await);
        }
        all
    }

    #[tokio::test]
    async fn nothing_but_what_was_sent_in_order_comes_through() {
        let (first, second): (&[u8], &[u8]) = (b"one", b"");
        let bytes = sent(&[first, second]).await;
        let good = received(&bytes, End::Listener, KEY, 3).await;
        assert_eq!(good[0].as_deref().unwrap(), first);
        assert_eq!(good[1].as_deref().unwrap(), second);
        assert!(good[2].is_err());
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            let got = received(&changed, End::Listener, KEY, 2).await;
            assert!(got.iter().any(Result::is_err), "byte {at} was changed unnoticed");
        }
        let frame = 4 + MAC + first.len();
        let again: Vec<u8> = [&bytes[..frame], &bytes[..frame]].concat();
        assert!(
            received(&again, End::Listener, KEY, 2).await[1].is_err(),
            "said twice"
        );
        assert!(
            received(&bytes[frame..], End::Listener, KEY, 1).await[0].is_err(),
            "out of order"
        );
        assert!(
            received(&bytes, End::Dialer, KEY, 1).await[0].is_err(),
            "an echo of ourselves"
        );
        assert!(
            received(&bytes, End::Listener, SessionKey([8; 32]), 1).await[0].is_err(),
            "another connection's"
        );
    }
}
