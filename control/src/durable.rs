//! Directories and small files that outlive the loss of power from the moment the call returns.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The directory that holds `path`.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        // Of a path like `state` the parent is the working directory.
        _ => Path::new("."),
    }
}

/// Makes a directory and all that lead to it, each known to the one above.
pub(crate) fn make_directory(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let above = parent(dir);
    make_directory(above)?;
    match fs::create_dir(dir) {
        // Somebody else has just made it.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
        made => made?,
    }
    File::open(above)?.sync_all()
}

/// Writes a file of its owner's eyes only, whole or not at all.
///
/// # Errors
/// When the system refuses; then the file is as it was. If it can not say whether the file is durable, the process ends:
/// whoever went on would act on what the next start may not find. That start reads what is there, as after a crash.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    let directory = File::open(parent(path))?;
    fs::rename(&fresh, path)?;
    if let Err(error) = directory.sync_all() {
        eprintln!(
            "unibody: whether {} is durable is unknown ({error}): the process ends",
            path.display()
        );
        std::process::abort();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_to_a_directory_is_made_too() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b/c");
        make_directory(&deep).unwrap();
        make_directory(&deep).unwrap();
        let file = deep.join("file.json");
        for text in ["one", "two"] {
            replace(&file, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
        assert_eq!(fs::read_dir(&deep).unwrap().count(), 1);
        assert!(make_directory(&file).is_err(), "a file is in the way");
    }
}
