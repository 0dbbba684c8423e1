//! Whom a command is for: one node by itself, over its control socket, or a cluster, over the API of any of its nodes.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;
use serde::de::DeserializeOwned;
use unibody_control::api::types::{ClusterStatus, Problem};
use unibody_control::cluster::{LocalRequest, NodeConfig};

/// Where a node of a cluster is looked for if nothing else is said.
pub(crate) const NODE_DIR: &str = "./node";
/// Where a node by itself is looked for.
const CONTROL: &str = "./state/control.sock";
/// Time for a node to answer; some things wait for other nodes.
const PATIENCE: Duration = Duration::from_secs(90);

/// Which node to talk to. A flag goes before the environment, UNIBODY_API there before UNIBODY_NODE before UNIBODY_CONTROL; without any
/// of them it is the node in ./node if there is one, else the one behind ./state/control.sock.
#[derive(Args, Clone, Default)]
pub(crate) struct NodeArgs {
    /// The control socket of a node by itself (`unibody serve`); its VMs are those of this machine [env: UNIBODY_CONTROL].
    #[arg(long, global = true, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// The directory of a cluster's node on this machine [env: UNIBODY_NODE].
    #[arg(long, global = true, value_name = "DIR")]
    node_dir: Option<PathBuf>,
    /// Any node of a cluster, HOST:PORT; the token is taken from UNIBODY_TOKEN [env: UNIBODY_API].
    #[arg(long, global = true, value_name = "ADDRESS")]
    api: Option<String>,
}

/// See the module.
pub(crate) enum Target {
    /// A node by itself, behind this control socket.
    Alone(PathBuf),
    /// A cluster.
    Cluster(Client),
}

/// How a command says whom it is for.
#[derive(Debug, PartialEq, Eq)]
enum Named {
    Api(String),
    Dir(PathBuf),
    Control(PathBuf),
}

impl NodeArgs {
    /// The one rule for all commands; `set` looks into the environment.
    fn named(&self, set: impl Fn(&str) -> Option<OsString>) -> Result<Named> {
        let flags = [
            self.api.clone().map(Named::Api),
            self.node_dir.clone().map(Named::Dir),
            self.control.clone().map(Named::Control),
        ];
        let mut flags = flags.into_iter().flatten();
        if let Some(named) = flags.next() {
            if flags.next().is_some() {
                bail!("--api, --node-dir and --control each name a node: give one of them");
            }
            return Ok(named);
        }
        if let Some(address) = set("UNIBODY_API") {
            return Ok(Named::Api(address.to_string_lossy().into_owned()));
        }
        if let Some(dir) = set("UNIBODY_NODE") {
            return Ok(Named::Dir(dir.into()));
        }
        if let Some(control) = set("UNIBODY_CONTROL") {
            return Ok(Named::Control(control.into()));
        }
        Ok(match Path::new(NODE_DIR).join("node.json").exists() {
            true => Named::Dir(NODE_DIR.into()),
            false => Named::Control(CONTROL.into()),
        })
    }

    /// Whom this names.
    pub(crate) fn target(&self) -> Result<Target> {
        match self.named(|name| std::env::var_os(name).filter(|value| !value.is_empty()))? {
            Named::Api(address) => {
                let token = std::env::var("UNIBODY_TOKEN")
                    .context("UNIBODY_TOKEN is not set: `unibody node token --api` prints it on a node")?;
                Ok(Target::Cluster(Client::new(&address, &token)))
            }
            Named::Dir(dir) => Client::of(&dir).map(Target::Cluster),
            Named::Control(control) => Ok(Target::Alone(control)),
        }
    }

    /// The cluster that this names.
    pub(crate) fn cluster(&self) -> Result<Client> {
        match self.target()? {
            Target::Cluster(client) => Ok(client),
            Target::Alone(_) => bail!("that is for a cluster: name a node of it with --node-dir or --api"),
        }
    }
}

/// Where the VMs of a cluster's node run.
pub(crate) fn runtime(dir: &Path) -> PathBuf {
    dir.join("vms")
}

fn agent(patience: Duration) -> ureq::Agent {
    ureq::Agent::config_builder()
        .timeout_global(Some(patience))
        .http_status_as_error(false)
        .proxy(None)
        .build()
        .into()
}

/// The API of a node.
pub(crate) struct Client {
    address: String,
    token: String,
    agent: ureq::Agent,
}

impl Client {
    fn new(address: &str, token: &str) -> Self {
        Client {
            address: address.to_owned(),
            token: token.to_owned(),
            agent: agent(PATIENCE),
        }
    }

    /// The same, for what may take so much longer.
    pub(crate) fn patient(self, more: Duration) -> Self {
        Client {
            agent: agent(PATIENCE + more),
            ..self
        }
    }

    /// The API of the node in a directory on this machine.
    pub(crate) fn of(dir: &Path) -> Result<Self> {
        let config = NodeConfig::load(dir)?;
        Ok(Client::new(&config.address, &config.api_token()))
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn bearer(&self) -> String {
        format!("Bearer {}", self.token)
    }

    fn answer<T: DeserializeOwned>(
        &self,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<T> {
        let mut answer = answer.with_context(|| {
            format!(
                "no node answers at {}: start it with `unibody node run`, or ask another",
                self.address
            )
        })?;
        let fine = answer.status().is_success();
        let body = answer.body_mut().with_config().limit(64 << 20).read_to_string()?;
        if !fine {
            let problem: Result<Problem, _> = serde_json::from_str(&body);
            bail!(problem.map_or(body, |problem| problem.error));
        }
        let text = if body.is_empty() { "null" } else { &body };
        serde_json::from_str(text).context("the node is of another version than this program")
    }

    pub(crate) fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let request = self
            .agent
            .get(self.url(path))
            .header("authorization", self.bearer());
        self.answer(request.call())
    }

    pub(crate) fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        let request = self
            .agent
            .post(self.url(path))
            .header("authorization", self.bearer());
        self.answer(request.send_json(body))
    }

    pub(crate) fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        let request = self
            .agent
            .put(self.url(path))
            .header("authorization", self.bearer());
        self.answer(request.send_json(body))
    }

    pub(crate) fn delete(&self, path: &str) -> Result<()> {
        let request = self
            .agent
            .delete(self.url(path))
            .header("authorization", self.bearer());
        self.answer(request.call())
    }

    pub(crate) fn status(&self) -> Result<ClusterStatus> {
        self.get("/v1/status")
    }

    /// Has one node do something: the named one, or the one that is asked.
    pub(crate) fn command(&self, node: Option<&str>, request: &LocalRequest) -> Result<serde_json::Value> {
        let node = match node {
            Some(node) => node.to_owned(),
            None => self.status()?.node,
        };
        self.post(&format!("/v1/nodes/{}/command", segment(&node)), request)
    }
}

/// A name as a segment of a path. What no name can be is refused by the node.
pub(crate) fn segment(name: &str) -> String {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let escape = |byte: u8| match fits(byte) {
        true => char::from(byte).to_string(),
        false => format!("%{byte:02X}"),
    };
    name.bytes().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_goes_before_the_environment_and_two_flags_are_refused() {
        let given = |api: bool, dir: bool, control: bool| NodeArgs {
            api: api.then(|| "h:1".into()),
            node_dir: dir.then(|| "d".into()),
            control: control.then(|| "s".into()),
        };
        let everything = |name: &str| Some(OsString::from(name));
        let named = |args: NodeArgs| args.named(everything).unwrap();
        assert_eq!(named(given(true, false, false)), Named::Api("h:1".into()));
        assert_eq!(named(given(false, true, false)), Named::Dir("d".into()));
        assert_eq!(named(given(false, false, true)), Named::Control("s".into()));
        assert_eq!(
            named(given(false, false, false)),
            Named::Api("UNIBODY_API".into())
        );
        let control = |name: &str| (name == "UNIBODY_CONTROL").then(|| OsString::from("s"));
        let named = given(false, false, false).named(control).unwrap();
        assert_eq!(named, Named::Control("s".into()));
        let two = given(true, false, true).named(everything).unwrap_err();
        assert!(two.to_string().contains("give one"), "{two}");
    }
}
