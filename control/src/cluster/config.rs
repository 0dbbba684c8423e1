//! What a node of a cluster remembers of itself beside its part of the cluster's state, and the token by which others join.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use unibody_dataplane::wire::handshake::Token;

use crate::durable;

const FILE: &str = "node.json";
const FORMAT: u32 = 1;
/// Bytes of a cluster's secret.
const SECRET: usize = 32;

/// Why the configuration can not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is none.
    #[error("there is no node in {0}: make one with `unibody node init` or `unibody node join`")]
    None(PathBuf),
    /// There is one already.
    #[error("there is a node in {0} already: start it with `unibody node run`, or choose another directory")]
    Exists(PathBuf),
    /// It makes no sense.
    #[error("{path} is not a node's configuration: {why}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// The system said no.
    #[error("{path} can not be used")]
    System {
        /// The file.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
}

/// A node's configuration: `node.json` in its directory, mode 0600, since the cluster's secret is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    format: u32,
    /// The cluster's secret, hexadecimal.
    secret: String,
    /// What people call the node.
    pub name: String,
    /// Where it listens, `host:port`: for other nodes and for the API.
    pub listen: String,
    /// Where others reach it, `host:port`.
    pub address: String,
    /// Failure domain of its disks, unless they name their own.
    pub domain: String,
    /// Bytes of memory for VMs.
    pub memory: u64,
    /// One reactor on each.
    pub cores: Vec<usize>,
    /// Memory for extent records, for each disk, bytes.
    pub cache_bytes: usize,
    /// Its disks, as after `--disk`.
    pub disks: Vec<String>,
    /// Put the fault injector in front of every disk.
    #[serde(default)]
    pub faults: bool,
    /// Seconds after which the disks of a node that is gone are given up and their data is placed elsewhere.
    pub out_after_s: u64,
    /// Nodes by way of which it joined, and by way of which it joins as a new one if it loses its part of the cluster's state.
    /// Empty for the first node, which must not found the cluster twice.
    #[serde(default)]
    pub seeds: Vec<String>,
}

/// What a node is made from.
#[derive(Clone, Debug)]
pub struct NodeSetup {
    /// See [`NodeConfig`].
    pub name: String,
    /// See [`NodeConfig`].
    pub listen: String,
    /// See [`NodeConfig`].
    pub address: String,
    /// See [`NodeConfig`]; the node's name if there is none.
    pub domain: Option<String>,
    /// See [`NodeConfig`].
    pub memory: u64,
    /// See [`NodeConfig`].
    pub cores: Vec<usize>,
    /// See [`NodeConfig`].
    pub cache_bytes: usize,
    /// See [`NodeConfig`].
    pub disks: Vec<String>,
    /// See [`NodeConfig`].
    pub faults: bool,
    /// See [`NodeConfig`].
    pub out_after: Duration,
}

/// What lets a new node in: the cluster's secret, and where to knock.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    secret: [u8; SECRET],
    /// Addresses of nodes, `host:port`.
    pub seeds: Vec<String>,
}

impl std::fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JoinToken({:?})", self.seeds)
    }
}

impl std::fmt::Display for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "unibody-{}-{}", hex(&self.secret), self.seeds.join(","))
    }
}

impl std::str::FromStr for JoinToken {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || "that is no join token: copy the whole line that `unibody node token` prints".to_owned();
        let rest = text.trim().strip_prefix("unibody-").ok_or_else(wrong)?;
        let (secret, seeds) = rest.split_once('-').ok_or_else(wrong)?;
        let secret = unhex(secret).ok_or_else(wrong)?;
        let seeds: Vec<String> = seeds.split(',').map(str::to_owned).collect();
        if seeds.iter().any(|seed| !seed.contains(':')) {
            return Err(wrong());
        }
        Ok(JoinToken { secret, seeds })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; SECRET]> {
    let mut bytes = [0; SECRET];
    if text.len() != 2 * SECRET || !text.is_ascii() {
        return None;
    }
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(bytes)
}

impl NodeConfig {
    /// The configuration of a node that begins a cluster (`token` absent) or joins one.
    ///
    /// # Errors
    /// When there is a node in `dir` already, or it can not be written.
    pub fn make(dir: &Path, setup: NodeSetup, token: Option<&JoinToken>) -> Result<Self, ConfigError> {
        let path = dir.join(FILE);
        if path.exists() {
            return Err(ConfigError::Exists(dir.to_path_buf()));
        }
        let mut secret = [0; SECRET];
        match token {
            Some(token) => secret = token.secret,
            None => crate::raft::fill_random(&mut secret),
        }
        let config = NodeConfig {
            format: FORMAT,
            secret: hex(&secret),
            domain: setup.domain.unwrap_or_else(|| setup.name.clone()),
            name: setup.name,
            listen: setup.listen,
            address: setup.address,
            memory: setup.memory,
            cores: setup.cores,
            cache_bytes: setup.cache_bytes,
            disks: setup.disks,
            faults: setup.faults,
            out_after_s: setup.out_after.as_secs(),
            seeds: token.map(|token| token.seeds.clone()).unwrap_or_default(),
        };
        durable::make_directory(dir).map_err(|source| ConfigError::System {
            path: dir.to_path_buf(),
            source,
        })?;
        config.save(dir)?;
        Ok(config)
    }

    /// Reads the configuration of the node in `dir`.
    ///
    /// # Errors
    /// When there is none, or it is damaged.
    pub fn load(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join(FILE);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ConfigError::None(dir.to_path_buf()));
            }
            Err(source) => return Err(ConfigError::System { path, source }),
        };
        let damaged = |why: String| ConfigError::Damaged {
            path: path.clone(),
            why,
        };
        let config: NodeConfig =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if config.format != FORMAT {
            return Err(damaged(format!("its format is {}, not {FORMAT}", config.format)));
        }
        unhex(&config.secret).ok_or_else(|| damaged("the secret is damaged".into()))?;
        Ok(config)
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn save(&self, dir: &Path) -> Result<(), ConfigError> {
        let path = dir.join(FILE);
        let text = serde_json::to_vec_pretty(self).expect("a configuration has string keys only");
        durable::replace(&path, &text).map_err(|source| ConfigError::System { path, source })
    }

    fn secret(&self) -> [u8; SECRET] {
        unhex(&self.secret).expect("checked when it was read")
    }

    /// What connections between nodes are proven with.
    pub fn wire_token(&self) -> Token {
        Token::new(&self.secret())
    }

    /// What users of the API show.
    pub fn api_token(&self) -> String {
        hex(&blake3::derive_key("unibody 2026-11 api token", &self.secret()))
    }

    /// What lets others in by way of nodes at `seeds`.
    pub fn join_token(&self, seeds: Vec<String>) -> JoinToken {
        JoinToken {
            secret: self.secret(),
            seeds,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup() -> NodeSetup {
        NodeSetup {
            name: "n1".into(),
            listen: "127.0.0.1:7400".into(),
            address: "127.0.0.1:7400".into(),
            domain: None,
            memory: 1 << 30,
            cores: vec![0],
            cache_bytes: 1 << 20,
            disks: vec!["/d0".into()],
            faults: false,
            out_after: Duration::from_secs(600),
        }
    }

    #[test]
    fn a_node_is_made_once_and_a_token_lets_another_in() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let config = NodeConfig::make(first.path(), setup(), None).unwrap();
        assert_eq!(NodeConfig::load(first.path()).unwrap(), config);
        assert!(matches!(
            NodeConfig::make(first.path(), setup(), None),
            Err(ConfigError::Exists(_))
        ));
        let text = config.join_token(vec!["10.0.0.1:7400".into()]).to_string();
        let token: JoinToken = text.parse().unwrap();
        assert_eq!(token.seeds, ["10.0.0.1:7400"]);
        let other = NodeConfig::make(second.path(), setup(), Some(&token)).unwrap();
        assert_eq!(other.api_token(), config.api_token());
        assert!(
            !format!("{token:?}").contains(&config.secret),
            "a secret is not shown"
        );
        for wrong in ["", "unibody-12-a:1", &text[..40], &text.replace(":7400", "")] {
            assert!(wrong.parse::<JoinToken>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_no_configuration_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(NodeConfig::load(dir.path()), Err(ConfigError::None(_))));
        fs::write(dir.path().join(FILE), "{}").unwrap();
        assert!(matches!(
            NodeConfig::load(dir.path()),
            Err(ConfigError::Damaged { .. })
        ));
    }
}
