//! The kernel of the Linux guest: a stock Debian one, unpacked from its package, with the few modules a guest needs.
//!
//! Invariant: the unpacked directory appears by rename when it is complete, so an interrupted download leaves nothing that
//! the next run would believe. Several test processes may ask at once: a file lock lets one work.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{run, tool};

/// The package that always depends on the present kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// What the guest needs: the disks, their bus, a file system and its checksums, the power button and the input it speaks by.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "crc32c_generic",
    "ext4",
    "button",
    "evdev",
];

/// A kernel and its modules.
pub(super) struct Kernel {
    /// The image to boot.
    pub(super) image: PathBuf,
    /// The modules in the order in which to load them.
    pub(super) modules: Vec<PathBuf>,
}

/// Gets the kernel into `cache`, unless it is there.
pub(super) fn get(cache: &Path) -> Result<Kernel> {
    fs::create_dir_all(cache).with_context(|| format!("making {}", cache.display()))?;
    let lock = File::create(cache.join("kernel.lock"))?;
    lock.lock()
        .context("waiting for another test that fetches the kernel")?;
    let unpacked = cache.join("kernel");
    if !unpacked.exists() {
        fetch(cache, &unpacked)?;
    }
    let image = single(&unpacked.join("boot"), "vmlinuz-")?;
    let tree = single(&unpacked.join("lib/modules"), "")?;
    Ok(Kernel {
        image,
        modules: in_order(&index(&tree)?, MODULES)?,
    })
}

fn fetch(cache: &Path, unpacked: &Path) -> Result<()> {
    let package = real_package()?;
    let part = cache.join("kernel.part");
    if part.exists() {
        fs::remove_dir_all(&part)?;
    }
    fs::create_dir_all(&part)?;
    run(Command::new(tool("apt-get", "apt")?).arg("download").arg(&package).current_dir(&part)).with_context(|| {
        format!("the Linux guest needs the Debian package {package}; let apt reach a mirror, or put the unpacked package at {}", unpacked.display())
    })?;
    let archive = single(&part, &package)?;
    let content = part.join("content");
    run(Command::new(tool("dpkg-deb", "dpkg")?)
        .arg("-x")
        .arg(archive)
        .arg(&content))?;
    fs::rename(&content, unpacked)?;
    fs::remove_dir_all(&part)?;
    Ok(())
}

/// The package with the kernel, on which the meta package depends.
fn real_package() -> Result<String> {
    let output = run(Command::new(tool("apt-cache", "apt")?).args(["depends", "--important", META_PACKAGE]))
        .with_context(|| format!("apt knows no {META_PACKAGE}; run `apt-get update`"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut names = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "));
    let name = names.find(|name| name.starts_with("linux-image-"));
    Ok(name
        .with_context(|| format!("{META_PACKAGE} depends on no kernel:\n{text}"))?
        .to_owned())
}

/// The one entry of a directory whose name begins so.
fn single(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        }
    }
    match &found[..] {
        [one] => Ok(one.clone()),
        _ => bail!(
            "{} should hold one {prefix}*, it holds {found:?}; remove the directory to fetch it again",
            dir.display()
        ),
    }
}

/// All modules under `tree` as (name, file), sorted.
fn index(tree: &Path) -> Result<Vec<(String, PathBuf)>> {
    let (mut modules, mut todo) = (Vec::new(), vec![tree.to_path_buf()]);
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir)? {
            let (path, kind) = entry.map(|entry| (entry.path(), entry.file_type()))?;
            if kind?.is_dir() {
                todo.push(path);
            } else if let Some(name) = path
                .file_name()
                .and_then(|name| name.to_str()?.strip_suffix(".ko"))
            {
                modules.push((name.replace('-', "_"), path));
            }
        }
    }
    modules.sort();
    Ok(modules)
}

/// The wanted modules, each behind those it depends on. One that is not there is taken to be built into the kernel.
fn in_order(index: &[(String, PathBuf)], wanted: &[&str]) -> Result<Vec<PathBuf>> {
    fn visit(
        index: &[(String, PathBuf)],
        name: &str,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<PathBuf>,
    ) -> Result<()> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Ok(at) = index.binary_search_by(|(candidate, _)| candidate.as_str().cmp(name)) else {
            return Ok(());
        };
        let path = &index[at].1;
        for dependency in dependencies(&fs::read(path)?) {
            visit(index, &dependency, seen, order)?;
        }
        order.push(path.clone());
        Ok(())
    }
    let (mut seen, mut order) = (BTreeSet::new(), Vec::new());
    for name in wanted {
        visit(index, name, &mut seen, &mut order)?;
    }
    Ok(order)
}

/// The modules that a module names in its own `depends=` entry.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    let value = String::from_utf8_lossy(value);
    value
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_behind_what_they_depend_on() {
        let dir = tempfile::tempdir().unwrap();
        for (name, depends) in [("a-x", "b,c_y"), ("b", "c-y"), ("c-y", ""), ("d", "")] {
            fs::write(
                dir.path().join(format!("{name}.ko")),
                format!("license=GPL\0depends={depends}\0name=z\0"),
            )
            .unwrap();
        }
        let order = in_order(&index(dir.path()).unwrap(), &["a_x", "built_in"]).unwrap();
        let names: Vec<_> = order
            .iter()
            .map(|path| path.file_name().unwrap().to_str().unwrap())
            .collect();
        assert_eq!(names, ["c-y.ko", "b.ko", "a-x.ko"]);
    }
}
