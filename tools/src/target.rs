//! Whom a command is for: one node by itself, over its control socket, or a cluster, over the API of any of its nodes.

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

/// Which node to talk to; without any of these, the node in ./node, else the one behind ./state/control.sock.
#[derive(Args, Clone, Default)]
pub(crate) struct NodeArgs {
    /// The control socket of a node by itself (`unibody serve`).
    #[arg(long, global = true, value_name = "SOCKET", env = "UNIBODY_CONTROL")]
    control: Option<PathBuf>,
    /// The directory of a cluster's node on this machine.
    #[arg(long, global = true, value_name = "DIR", env = "UNIBODY_NODE")]
    node_dir: Option<PathBuf>,
    /// Any node of a cluster, HOST:PORT; the token is taken from UNIBODY_TOKEN.
    #[arg(long, global = true, value_name = "ADDRESS", env = "UNIBODY_API")]
    api: Option<String>,
}

/// See the module.
pub(crate) enum Target {
    /// A control socket.
    Alone(PathBuf),
    /// A cluster.
    Cluster(Client),
}

impl NodeArgs {
    /// Whom this names.
    pub(crate) fn target(&self) -> Result<Target> {
        if let Some(address) = &self.api {
            let token = std::env::var("UNIBODY_TOKEN")
                .context("UNIBODY_TOKEN is not set: `unibody node token --api` prints it on a node")?;
            return Ok(Target::Cluster(Client::new(address, &token)));
        }
        if let Some(dir) = &self.node_dir {
            return Client::of(dir).map(Target::Cluster);
        }
        if let Some(control) = &self.control {
            return Ok(Target::Alone(control.clone()));
        }
        if Path::new(NODE_DIR).join("node.json").exists() {
            return Client::of(Path::new(NODE_DIR)).map(Target::Cluster);
        }
        Ok(Target::Alone(CONTROL.into()))
    }

    /// The cluster that this names.
    pub(crate) fn cluster(&self) -> Result<Client> {
        match self.target()? {
            Target::Cluster(client) => Ok(client),
            Target::Alone(_) => bail!("that is for a cluster: name a node of it with --node-dir or --api"),
        }
    }

    /// Where the VMs of the node run that this names.
    pub(crate) fn runtime(&self) -> Option<PathBuf> {
        self.node_dir.as_ref().map(|dir| runtime(dir))
    }
}

/// Where the VMs of a cluster's node run.
pub(crate) fn runtime(dir: &Path) -> PathBuf {
    dir.join("vms")
}

/// The API of a node.
pub(crate) struct Client {
    address: String,
    token: String,
    agent: ureq::Agent,
}

impl Client {
    fn new(address: &str, token: &str) -> Self {
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .http_status_as_error(false)
            .proxy(None)
            .build()
            .into();
        Client {
            address: address.to_owned(),
            token: token.to_owned(),
            agent,
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
