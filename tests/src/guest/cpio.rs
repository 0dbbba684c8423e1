//! Writes a cpio archive in the `newc` format, which the Linux kernel unpacks as its first file system.
//!
//! Invariant: all metadata is fixed (owner 0, time 0, inode numbers counted), so equal content gives equal bytes.

/// What kind of entry is added, with its permissions.
const FILE: u32 = 0o100_755;
const DIRECTORY: u32 = 0o040_755;
const DEVICE: u32 = 0o020_600;

/// An archive under construction.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    directories: std::collections::BTreeSet<String>,
}

impl Archive {
    /// Adds a file with all permissions for its owner, and the directories above it.
    pub(super) fn file(&mut self, path: &str, content: &[u8]) {
        self.parents(path);
        self.entry(path, FILE, (0, 0), content);
    }

    /// Adds a character device.
    pub(super) fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.parents(path);
        self.entry(path, DEVICE, (major, minor), &[]);
    }

    /// The finished archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            if self.directories.insert(path[..at].to_owned()) {
                self.entry(&path[..at], DIRECTORY, (0, 0), &[]);
            }
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let (size, name_size) = (content.len() as u32, path.len() as u32 + 1);
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let header = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in header {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    /// Names and contents end at a multiple of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_layout_is_that_of_newc() {
        let mut archive = Archive::default();
        archive.file("a/b", b"xyz");
        archive.file("a/c", b"");
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(
            text.matches("070701").count(),
            4,
            "one directory, two files, the trailer"
        );
        assert!(text.starts_with("07070100000001000041ed"));
        let file = text.find("a/b\0").unwrap();
        assert_eq!(&bytes[file - 110..file - 104], b"070701");
        assert_eq!((file - 110) % 4, 0);
        assert_eq!(&bytes[file - 110 + 54..file - 110 + 62], b"00000003");
        // The header is 110 bytes long, so the content begins where header and name end, rounded up.
        let content = (110 + 4usize).next_multiple_of(4) + file - 110;
        assert_eq!(&bytes[content..content + 4], b"xyz\0");
        assert_eq!(bytes.len() % 4, 0);
    }
}
