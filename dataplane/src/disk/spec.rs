//! How a disk is named on a command line or in a configuration: `mem:2G,domain=a`, `null:1G`, `./d0.img,domain=b`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// What a disk is kept in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// This process's memory, bytes.
    Memory(u64),
    /// Nothing, bytes pretended.
    Null(u64),
    /// A file or block device.
    Path(PathBuf),
}

/// A disk by name, and the failure domain it is in (its own, if not said).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// What it is kept in.
    pub backend: Backend,
    /// The failure domain.
    pub domain: Option<String>,
}

/// Why a disk's name is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Nothing there.
    #[error("a disk needs a path, `mem:SIZE` or `null:SIZE`")]
    Empty,
    /// Not a size.
    #[error(
        "`{0}` is not a size: a whole number of bytes, or one followed by K, M, G or T (powers of 1024), more than zero"
    )]
    Size(String),
    /// An option that is none.
    #[error("`{0}` is not an option of a disk; there is `domain=NAME`")]
    Option(String),
    /// Twice.
    #[error("`domain=` is given twice")]
    Twice,
    /// No name.
    #[error("`{0}` is no failure domain: use letters, digits, `.`, `_` and `-`, 64 at most")]
    Domain(String),
}

impl FromStr for DiskSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let mut parts = text.split(',');
        let backend = match parts.next().unwrap_or("") {
            "" => return Err(SpecError::Empty),
            name => match (name.strip_prefix("mem:"), name.strip_prefix("null:")) {
                (Some(size), _) => Backend::Memory(parse_size(size)?),
                (_, Some(size)) => Backend::Null(parse_size(size)?),
                _ => Backend::Path(PathBuf::from(name)),
            },
        };
        let mut domain = None;
        for part in parts {
            let name = part
                .strip_prefix("domain=")
                .ok_or_else(|| SpecError::Option(part.into()))?;
            let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
            if name.is_empty() || name.len() > 64 || !name.chars().all(fits) {
                return Err(SpecError::Domain(name.into()));
            }
            if domain.replace(name.to_owned()).is_some() {
                return Err(SpecError::Twice);
            }
        }
        Ok(DiskSpec { backend, domain })
    }
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.backend {
            Backend::Memory(bytes) => write!(f, "mem:{bytes}")?,
            Backend::Null(bytes) => write!(f, "null:{bytes}")?,
            Backend::Path(path) => write!(f, "{}", path.display())?,
        }
        match &self.domain {
            Some(domain) => write!(f, ",domain={domain}"),
            None => Ok(()),
        }
    }
}

/// A number of bytes: `4096`, `64K`, `2G`. Units are powers of 1024; `KiB` and `K` mean the same.
///
/// # Errors
/// [`SpecError::Size`], also for zero and for more than 2^63.
pub fn parse_size(text: &str) -> Result<u64, SpecError> {
    let wrong = || SpecError::Size(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let shift = match text[digits..]
        .trim_end_matches("iB")
        .to_ascii_uppercase()
        .as_str()
    {
        "" if digits == text.len() => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..digits].parse().map_err(|_| wrong())?;
    match number.checked_mul(1 << shift) {
        Some(bytes) if bytes > 0 && bytes <= 1 << 63 => Ok(bytes),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn understands_what_is_documented() {
        let spec = |text: &str| text.parse::<DiskSpec>();
        assert_eq!(
            spec("mem:2G,domain=a"),
            Ok(DiskSpec {
                backend: Backend::Memory(2 << 30),
                domain: Some("a".into())
            })
        );
        assert_eq!(spec("null:1G").unwrap().backend, Backend::Null(1 << 30));
        assert_eq!(
            spec("./d0.img,domain=rack-1.b"),
            Ok(DiskSpec {
                backend: Backend::Path("./d0.img".into()),
                domain: Some("rack-1.b".into())
            })
        );
        for text in ["mem:1073741824,domain=a", "null:4096", "/dev/sdb"] {
            assert_eq!(spec(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn refuses_the_rest_and_says_why() {
        let spec = |text: &str| text.parse::<DiskSpec>().unwrap_err();
        assert_eq!(spec(""), SpecError::Empty);
        assert_eq!(spec(",domain=a"), SpecError::Empty);
        for size in [
            "",
            "0",
            "-1",
            "2X",
            "G",
            "1.5G",
            "99999999999T",
            "20000000000000000000",
            "1GB",
            "1 G",
            "1iB",
        ] {
            assert_eq!(
                spec(&format!("mem:{size}")),
                SpecError::Size(size.into()),
                "{size}"
            );
        }
        assert_eq!(spec("x,size=3"), SpecError::Option("size=3".into()));
        assert_eq!(spec("x,"), SpecError::Option(String::new()));
        assert_eq!(spec("x,domain="), SpecError::Domain(String::new()));
        assert_eq!(spec("x,domain=a b"), SpecError::Domain("a b".into()));
        assert_eq!(spec("x,domain=a,domain=b"), SpecError::Twice);
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("512", 512),
            ("64K", 65536),
            ("1m", 1 << 20),
            ("3GiB", 3 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes));
        }
    }
}
