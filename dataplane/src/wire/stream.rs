//! The two directions of a connection as bytes: frames gathered for one `sendmsg`, and what came cut into frames.
//!
//! Invariants:
//! * What a batch names (headers of its own, data of others) stays as it is until all of it was sent or the connection has
//!   ended: the owner of the data is told by [`Batch::sent`].
//! * What is received goes to one buffer of fixed size and is handed on block by block as it comes, so that data is copied
//!   once more at most. Only a sealing is longer than the buffer; it is collected as it comes, never by its announced length.
//! * Steady state allocates nothing.
//!
//! Deliberately absent: sockets. The driver sends what [`Batch::message`] names and receives into [`Incoming::room`].

use super::frame::{FrameError, HEAD, Head, Kind, Layout, META_MAX, Sequence};
use super::handshake::SessionKey;
use crate::ids::{BLOCK, BlockMask};
use crate::memory::{Arena, Payload};

/// Frames in one batch.
pub const FRAMES_MAX: usize = 64;
/// Pieces of memory in one batch; the kernel takes no more.
const PIECES_MAX: usize = 1024;
/// A batch with this many bytes is not added to.
const BATCH_BYTES: usize = 512 * 1024;
/// Bytes of the receive buffer.
const ROOM: usize = 256 * 1024;

const NO_PIECE: libc::iovec = libc::iovec {
    iov_base: std::ptr::null_mut(),
    iov_len: 0,
};

/// Frames on their way out.
pub struct Batch {
    sequence: Sequence,
    heads: Box<[[u8; HEAD + META_MAX]; FRAMES_MAX]>,
    frames: usize,
    pieces: Box<[libc::iovec; PIECES_MAX]>,
    count: usize,
    /// Pieces of which all was sent.
    gone: usize,
    bytes: usize,
    /// Contents that are too long for `heads`.
    long: Vec<Vec<u8>>,
    message: Box<libc::msghdr>,
}

// SAFETY: the pointers name the batch's own boxes and memory of requests, which their owners keep wherever it is used from
// (`memory`'s rule).
unsafe impl Send for Batch {}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Batch({} frames, {} bytes)", self.frames, self.bytes)
    }
}

impl Batch {
    /// Nothing yet.
    pub fn new() -> Self {
        // SAFETY: an empty message header is all zeros.
        let message = unsafe { std::mem::zeroed() };
        Batch {
            sequence: Sequence::new(&SessionKey([0; 32]), true),
            heads: Box::new([[0; HEAD + META_MAX]; FRAMES_MAX]),
            frames: 0,
            pieces: Box::new([NO_PIECE; PIECES_MAX]),
            count: 0,
            gone: 0,
            bytes: 0,
            long: Vec::new(),
            message: Box::new(message),
        }
    }

    /// A connection begins. Nothing may be on its way.
    pub fn begin(&mut self, key: &SessionKey, from_dialer: bool) {
        self.clear();
        self.sequence = Sequence::new(key, from_dialer);
    }

    /// Nothing is gathered.
    pub fn is_empty(&self) -> bool {
        self.frames == 0
    }

    /// Whether one more frame of every day's size fits.
    pub fn has_room(&self) -> bool {
        self.frames < FRAMES_MAX && self.bytes < BATCH_BYTES && self.count + 64 < PIECES_MAX
    }

    /// Adds a frame; there is room. The data's memory is named until the batch was sent.
    ///
    /// # Safety
    /// The payload is as long as `data` wants and stays as it is until the batch is empty again.
    pub unsafe fn push(&mut self, head: &Head, meta: &[u8], data: (Payload, BlockMask)) {
        let n = self.frames;
        self.frames += 1;
        let room = &mut self.heads[n];
        let (first, rest) = room
            .split_first_chunk_mut::<HEAD>()
            .expect("longer than a header");
        head.encode(&mut self.sequence, first);
        if meta.len() <= rest.len() {
            rest[..meta.len()].copy_from_slice(meta);
            let (ptr, len) = (self.heads[n].as_mut_ptr(), HEAD + meta.len());
            self.add(ptr, len);
        } else {
            let ptr = self.heads[n].as_mut_ptr();
            self.add(ptr, HEAD);
            let mut long = meta.to_vec();
            self.add(long.as_mut_ptr(), long.len());
            self.long.push(long);
        }
        crate::ids::mask_runs(data.1, |first, count| {
            let payload = data.0.advance(usize::from(first) * BLOCK);
            // SAFETY: the caller vouches for the payload.
            let missing =
                unsafe { payload.pieces(usize::from(count) * BLOCK, |ptr, len| self.add(ptr, len)) };
            assert_eq!(missing, 0, "a request's memory is as long as the request");
        });
    }

    fn add(&mut self, ptr: *mut u8, len: usize) {
        self.bytes += len;
        if let Some(last) = self.pieces[..self.count].last_mut()
            && last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == ptr
        {
            last.iov_len += len;
            return;
        }
        assert!(
            self.count < PIECES_MAX,
            "a frame has fewer pieces than are kept free for it"
        );
        self.pieces[self.count] = libc::iovec {
            iov_base: ptr.cast(),
            iov_len: len,
        };
        self.count += 1;
    }

    /// What is to be sent now. Stays where it is until [`Batch::sent`].
    pub fn message(&mut self) -> *const libc::msghdr {
        self.message.msg_iov = self.pieces[self.gone..].as_mut_ptr();
        self.message.msg_iovlen = self.count - self.gone;
        &raw const *self.message
    }

    /// The same for who sends by other means.
    pub fn pieces(&self) -> &[libc::iovec] {
        &self.pieces[self.gone..self.count]
    }

    /// So many bytes went out. True: all of them, nothing is named any more; else the rest has to be sent.
    pub fn sent(&mut self, mut bytes: usize) -> bool {
        while self.gone < self.count {
            let piece = &mut self.pieces[self.gone];
            if bytes < piece.iov_len {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(bytes).cast();
                piece.iov_len -= bytes;
                return false;
            }
            bytes -= piece.iov_len;
            self.gone += 1;
        }
        self.clear();
        true
    }

    /// The connection has ended, nothing is on its way: names nothing any more.
    pub fn clear(&mut self) {
        (self.frames, self.count, self.gone, self.bytes) = (0, 0, 0, 0);
        self.long.clear();
    }
}

impl Default for Batch {
    fn default() -> Self {
        Self::new()
    }
}

/// What comes next of what came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A header; its content follows. This is the time to refuse it.
    Head(Head, Layout),
    /// The content of the frame is there: [`Incoming::meta`].
    Meta,
    /// A block of its data is there: [`Incoming::block`]. The number is its place in the payload.
    Block(u8),
    /// The frame is over.
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Await {
    Head,
    Meta,
    Data,
}

/// What came.
#[derive(Debug)]
pub struct Incoming {
    sequence: Sequence,
    buffer: Arena,
    from: usize,
    to: usize,
    state: Await,
    head: Head,
    layout: Layout,
    /// Blocks of the frame still to come.
    left: BlockMask,
    long: Vec<u8>,
    /// The part given out last, to be passed over.
    part: usize,
}

impl Incoming {
    /// A buffer.
    ///
    /// # Errors
    /// When the kernel has no memory for it.
    pub fn new() -> std::io::Result<Self> {
        Ok(Incoming {
            sequence: Sequence::new(&SessionKey([0; 32]), true),
            buffer: Arena::new(ROOM / BLOCK)?,
            from: 0,
            to: 0,
            state: Await::Head,
            head: Head::new(Kind::Credits),
            layout: Layout { meta: 0, data: 0 },
            left: 0,
            long: Vec::new(),
            part: 0,
        })
    }

    /// A connection begins.
    pub fn begin(&mut self, key: &SessionKey, from_dialer: bool) {
        self.sequence = Sequence::new(key, from_dialer);
        (self.from, self.to, self.part) = (0, 0, 0);
        self.state = Await::Head;
        self.long = Vec::new();
    }

    /// Where the next bytes go. Everything that can be taken was taken before, so there is room.
    pub fn room(&mut self) -> (*mut u8, usize) {
        let (from, to) = (self.from, self.to);
        self.buffer.bytes_mut(0, ROOM / BLOCK).copy_within(from..to, 0);
        (self.from, self.to) = (0, to - from);
        assert!(self.to < ROOM, "what is left is less than a block");
        (self.buffer.span().0.wrapping_add(self.to), ROOM - self.to)
    }

    /// So many came.
    pub fn filled(&mut self, bytes: usize) {
        assert!(bytes <= ROOM - self.to);
        self.to += bytes;
    }

    fn have(&self) -> &[u8] {
        &self.buffer.bytes(0, ROOM / BLOCK)[self.from..self.to]
    }

    /// The next part, or `None` if more must come first.
    ///
    /// # Errors
    /// What came is no frame that may come: the connection is of no use any more.
    pub fn take(&mut self) -> Result<Option<Part>, FrameError> {
        self.from += std::mem::take(&mut self.part);
        match self.state {
            Await::Head => {
                let Some(bytes) = self.have().first_chunk::<HEAD>() else {
                    return Ok(None);
                };
                let bytes = *bytes;
                let head = Head::decode(&mut self.sequence, &bytes)?;
                self.layout = head.layout()?;
                self.head = head;
                if self.layout.meta > ROOM / 2 && head.kind != Kind::Sealed {
                    return Err(FrameError::Length);
                }
                self.part = HEAD;
                self.state = Await::Meta;
                self.left = self.layout.data;
                self.long = Vec::new();
                Ok(Some(Part::Head(head, self.layout)))
            }
            Await::Meta => {
                let want = self.layout.meta;
                if want > ROOM / 2 {
                    let take = self.have().len().min(want - self.long.len());
                    let bytes = &self.buffer.bytes(0, ROOM / BLOCK)[self.from..self.from + take];
                    self.long.extend_from_slice(bytes);
                    self.from += take;
                    if self.long.len() < want {
                        return Ok(None);
                    }
                } else {
                    if self.have().len() < want {
                        return Ok(None);
                    }
                    self.part = want;
                }
                self.state = Await::Data;
                Ok(Some(Part::Meta))
            }
            Await::Data => {
                if self.left == 0 {
                    self.state = Await::Head;
                    return Ok(Some(Part::End));
                }
                if self.have().len() < BLOCK {
                    return Ok(None);
                }
                let block = self.left.trailing_zeros() as u8;
                self.left &= self.left - 1;
                self.part = BLOCK;
                Ok(Some(Part::Block(block)))
            }
        }
    }

    /// The header of the frame under way.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The content just announced.
    pub fn meta(&self) -> &[u8] {
        if self.layout.meta > ROOM / 2 {
            &self.long
        } else {
            &self.have()[..self.layout.meta]
        }
    }

    /// The block just announced.
    pub fn block(&self) -> *const u8 {
        self.have()[..BLOCK].as_ptr()
    }
}
