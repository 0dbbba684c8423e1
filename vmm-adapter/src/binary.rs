//! Finding a VMM's program: an environment variable, or PATH.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{VmmError, VmmKind};

/// How one VMM's program is called.
pub(crate) struct Binary {
    pub(crate) kind: VmmKind,
    /// The environment variable that names it, and wins.
    pub(crate) variable: &'static str,
    /// Its name in PATH.
    pub(crate) name: &'static str,
}

impl Binary {
    /// Where it is.
    pub(crate) fn find(&self) -> Result<PathBuf, VmmError> {
        self.find_in(
            std::env::var_os(self.variable).as_deref(),
            std::env::var_os("PATH").as_deref(),
        )
    }

    fn find_in(&self, variable: Option<&OsStr>, path: Option<&OsStr>) -> Result<PathBuf, VmmError> {
        let missing = |searched| VmmError::NoBinary {
            kind: self.kind,
            searched,
            variable: self.variable,
        };
        if let Some(value) = variable.filter(|value| !value.is_empty()) {
            let named = PathBuf::from(value);
            return if is_program(&named) {
                Ok(named)
            } else {
                Err(missing(format!(
                    "{} says {}, which is no executable file",
                    self.variable,
                    named.display()
                )))
            };
        }
        std::env::split_paths(path.unwrap_or_default())
            .map(|dir| dir.join(self.name))
            .find(|candidate| candidate.is_absolute() && is_program(candidate))
            .ok_or_else(|| missing(format!("no {} in PATH", self.name)))
    }

    /// The first line of what `--version` prints.
    pub(crate) fn version(&self, binary: &Path) -> Result<String, VmmError> {
        let output = Command::new(binary)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(VmmError::io("asking for the version", binary))?;
        let text = String::from_utf8_lossy(&output.stdout);
        match text.lines().next() {
            Some(line) if output.status.success() => Ok(line.trim().to_owned()),
            _ => Err(VmmError::Unsupported {
                kind: self.kind,
                problem: format!(
                    "{} --version ended with {}; is it the right program?",
                    binary.display(),
                    output.status
                ),
            }),
        }
    }
}

fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SH: Binary = Binary {
        kind: VmmKind::Qemu,
        variable: "UNIBODY_QEMU",
        name: "sh",
    };

    #[test]
    fn the_variable_wins_and_is_not_silently_passed_over() {
        let path = Some(OsStr::new("relative:/bin:/usr/bin"));
        assert_eq!(SH.find_in(None, path).unwrap(), Path::new("/bin/sh"));
        assert_eq!(
            SH.find_in(Some(OsStr::new("")), path).unwrap(),
            Path::new("/bin/sh")
        );
        assert_eq!(
            SH.find_in(Some(OsStr::new("/bin/cat")), path).unwrap(),
            Path::new("/bin/cat")
        );
        for bad in ["/none", "/etc/passwd", "/etc"] {
            let error = SH.find_in(Some(OsStr::new(bad)), path).unwrap_err().to_string();
            assert!(error.contains(bad) && error.contains("UNIBODY_QEMU"), "{error}");
        }
        let error = SH
            .find_in(None, Some(OsStr::new("/none")))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("no sh in PATH") && error.contains("UNIBODY_QEMU"),
            "{error}"
        );
    }
}
