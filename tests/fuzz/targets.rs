//! The fuzz targets: one table for libFuzzer's programs (`fuzz_targets/`) and for the replay on a stable compiler
//! (`tests/tests/corpora.rs`). How to add one: `README.md` beside this file.

use std::sync::OnceLock;

use unibody_dataplane::disk::spec::DiskSpec;
use unibody_dataplane::disk::{BlockIo, IoError};
use unibody_dataplane::ids::DiskUuid;
use unibody_dataplane::store::{FormatOptions, Store};

/// A function that takes any bytes.
pub(crate) type Target = fn(&[u8]);

/// All of them, by the name of the program and of the corpus.
pub(crate) const TARGETS: &[(&str, Target)] = &[
    ("api_body", unibody_control::api::fuzz_body),
    ("control_call", unibody_control::raft::fuzz_call),
    ("control_log", unibody_control::raft::fuzz_log),
    ("control_snapshot", unibody_control::raft::fuzz_snapshot),
    ("control_state", unibody_control::local::fuzz_state),
    ("descriptor_chain", unibody_dataplane::frontend::fuzz_chain),
    ("disk_image", disk_image),
    ("disk_spec", disk_spec),
    ("journal_block", unibody_dataplane::store::fuzz::journal_block),
    ("record", unibody_dataplane::store::fuzz::record),
    ("superblock", unibody_dataplane::store::fuzz::superblock),
    ("vm_spec", unibody_vmm_adapter::fuzz_spec),
    ("wire_asker", unibody_dataplane::wire::fuzz::wire_asker),
    ("wire_frame", unibody_dataplane::wire::fuzz::wire_frame),
    ("wire_handshake", unibody_dataplane::wire::fuzz::wire_handshake),
    ("wire_server", unibody_dataplane::wire::fuzz::wire_server),
];

/// Calls the target of this name.
pub(crate) fn run(name: &str, data: &[u8]) {
    let (_, target) = TARGETS
        .iter()
        .find(|(known, _)| *known == name)
        .expect("a target of the table");
    target(data);
}

/// What stands after `--disk`.
fn disk_spec(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = text.parse::<DiskSpec>();
    }
}

/// Smallest disk that can be formatted, bytes.
const DISK_BYTES: usize = 4 << 20;

/// A freshly formatted disk with `data` scattered over it, then checked and opened. The input is a list of patches: three
/// bytes of offset, one of length, the bytes. Bytes alone would have to be four million before anything looked at them.
fn disk_image(data: &[u8]) {
    static FORMATTED: OnceLock<Vec<u8>> = OnceLock::new();
    let formatted = FORMATTED.get_or_init(|| {
        let mut image = Image(vec![0; DISK_BYTES]);
        let options = FormatOptions {
            uuid: DiskUuid(1),
            journal_bytes: None,
            force: false,
            already_zero: true,
        };
        Store::format(&mut image, &options).expect("memory can be formatted");
        image.0
    });
    let mut image = formatted.clone();
    let mut left = data;
    while let [a, b, c, len, rest @ ..] = left {
        let (patch, after) = rest.split_at(rest.len().min(usize::from(*len)));
        let at = usize::from(*a) | usize::from(*b) << 8 | usize::from(*c) << 16;
        for (byte, new) in image.iter_mut().skip(at % DISK_BYTES).zip(patch) {
            *byte = *new;
        }
        left = after;
    }
    unibody_dataplane::store::fuzz::image(&image);
}

/// Memory to be formatted.
struct Image(Vec<u8>);

impl Image {
    fn part(&mut self, offset: u64, len: usize) -> Result<&mut [u8], IoError> {
        let from = usize::try_from(offset).map_err(|_| IoError::Media)?;
        self.0
            .get_mut(from..from.saturating_add(len))
            .ok_or(IoError::Media)
    }
}

impl BlockIo for Image {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> Result<(), IoError> {
        buf.copy_from_slice(self.part(offset, buf.len())?);
        Ok(())
    }

    fn write(&mut self, offset: u64, buf: &[u8]) -> Result<(), IoError> {
        self.part(offset, buf.len())?.copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&mut self, offset: u64, len: u64) -> Result<(), IoError> {
        self.part(offset, len as usize)?.fill(0);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), IoError> {
        Ok(())
    }
}
