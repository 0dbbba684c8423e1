//! `unibody serve`: one node's data plane in the foreground, from flags or from a TOML file.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Deserialize;
use unibody_control::admin::VolumeSpec;
use unibody_control::node::{Node, NodeOptions};
use unibody_dataplane::disk::spec::{Backend, DiskSpec};

use crate::output::{Out, parse_size};

#[derive(Args)]
pub(crate) struct ServeArgs {
    /// Read cores, disks, volumes and the rest from this TOML file; flags add to it.
    #[arg(long)]
    config: Option<PathBuf>,
    /// One polled reactor on each of these cores, for example 0 or 0,1 [default: 0].
    #[arg(long, value_delimiter = ',')]
    cores: Vec<usize>,
    /// A disk: a formatted file or block device, `mem:2G`, or `null:1G`; `,domain=a` names its failure domain.
    #[arg(long = "disk", value_name = "SPEC")]
    disks: Vec<String>,
    /// A volume: `NAME,size=1G,mirror=2,width=4,unit=256K,socket=PATH,queues=1,readonly`, all but NAME optional. It is created if the
    /// state does not know it.
    #[arg(long = "volume", value_name = "SPEC")]
    volumes: Vec<String>,
    /// Where the node keeps what it must remember; needed with disks that keep data.
    #[arg(long)]
    state: Option<PathBuf>,
    /// The control socket [default: control.sock in the state directory; none without one].
    #[arg(long)]
    control: Option<PathBuf>,
    /// Memory for extent records, for each disk: 4 KiB cover 2 MiB of data [default: 64M].
    #[arg(long, value_parser = parse_size)]
    cache: Option<u64>,
    /// Put a fault injector in front of every disk, for drills (`disk fault`). It costs a little.
    #[arg(long)]
    faults: bool,
}

/// The file behind `--config`.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct ServeFile {
    #[serde(default)]
    cores: Vec<usize>,
    #[serde(default)]
    disks: Vec<String>,
    #[serde(default)]
    volumes: Vec<String>,
    state: Option<PathBuf>,
    control: Option<PathBuf>,
    cache: Option<String>,
}

pub(crate) fn run(args: ServeArgs, out: Out) -> Result<()> {
    let options = options(args)?;
    let sockets: Vec<_> = options.volumes.iter().filter_map(|v| v.socket.clone()).collect();
    let stop = unibody_control::node::stop_on_signals().context("signals can not be caught")?;
    raise_file_limit();
    let node = Node::start(options)?;
    for line in node.notices() {
        eprintln!("unibody: {line}");
    }
    for socket in &sockets {
        eprintln!("unibody: serving {}", socket.display());
    }
    match out.json {
        true => println!("{}", serde_json::json!({ "ready": true, "sockets": sockets })),
        false => println!("ready"),
    }
    node.run(stop)?;
    Ok(())
}

/// A thousand devices need ten thousand descriptors: takes what the system allows.
pub(crate) fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // Where it is refused, few devices still work, and one too many says why it does not.
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            ..limit
        },
    )
    .ok();
}

fn options(args: ServeArgs) -> Result<NodeOptions> {
    let file = match &args.config {
        Some(path) => read_file(path)?,
        None => ServeFile::default(),
    };
    let texts: Vec<String> = file.disks.into_iter().chain(args.disks).collect();
    if texts.is_empty() {
        bail!(
            "a node needs disks: add --disk ./d0.img (after `unibody disk format ./d0.img --size 8G`) or --disk mem:2G"
        );
    }
    let disks = texts
        .iter()
        .map(|text| text.parse::<DiskSpec>().with_context(|| format!("--disk {text}")))
        .collect::<Result<Vec<_>>>()?;
    let volumes = file
        .volumes
        .iter()
        .chain(&args.volumes)
        .map(|text| parse_volume(text).with_context(|| format!("--volume {text}")))
        .collect::<Result<Vec<_>>>()?;
    let state = args.state.or(file.state);
    if state.is_none() && disks.iter().any(|disk| matches!(disk.backend, Backend::Path(_))) {
        bail!("disks that keep data need a place for the node's state: add --state ./state");
    }
    let cores = if args.cores.is_empty() {
        file.cores
    } else {
        args.cores
    };
    let cache = match (args.cache, file.cache) {
        (Some(bytes), _) => bytes,
        (None, Some(text)) => parse_size(&text).map_err(anyhow::Error::msg).context("cache")?,
        (None, None) => 64 << 20,
    };
    Ok(NodeOptions {
        cores: if cores.is_empty() { vec![0] } else { cores },
        disks,
        volumes,
        control: args
            .control
            .or(file.control)
            .or_else(|| state.as_ref().map(|dir| dir.join("control.sock"))),
        state,
        cache_bytes: cache as usize,
        faults: args.faults,
    })
}

fn read_file(path: &Path) -> Result<ServeFile> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("{} can not be read", path.display()))?;
    toml::from_str(&text).with_context(|| format!("{} is not a serve file", path.display()))
}

fn parse_volume(text: &str) -> Result<VolumeSpec> {
    let mut parts = text.split(',');
    let name = parts.next().unwrap_or_default().to_owned();
    let mut spec = VolumeSpec {
        name,
        size: None,
        mirror: None,
        stripe_width: None,
        stripe_unit: None,
        socket: None,
        queues: None,
        read_only: false,
    };
    for part in parts {
        let (key, value) = part.split_once('=').unwrap_or((part, ""));
        let number = || {
            value
                .parse::<u32>()
                .with_context(|| format!("{key}={value}: a number is needed"))
        };
        let bytes = || {
            parse_size(value)
                .map_err(anyhow::Error::msg)
                .with_context(|| format!("{key}={value}"))
        };
        match key {
            "size" => spec.size = Some(bytes()?),
            "mirror" => spec.mirror = Some(number()?),
            "width" => spec.stripe_width = Some(number()?),
            "unit" => spec.stripe_unit = Some(bytes()?),
            "socket" => spec.socket = Some(PathBuf::from(value)),
            "queues" => spec.queues = Some(number()?.try_into().context("queues: at most 65535")?),
            "readonly" if value.is_empty() => spec.read_only = true,
            _ => bail!("{key}: unknown; use size, mirror, width, unit, socket, queues or readonly"),
        }
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Options are compared as a whole, so what is added to them later is compared too.
    #[test]
    fn a_file_says_what_flags_say() {
        #[derive(clap::Parser)]
        struct Flags {
            #[command(flatten)]
            args: ServeArgs,
        }
        let given = |words: &[&str]| {
            let Flags { args } = clap::Parser::parse_from([&["serve"], words].concat());
            format!("{:?}", options(args).unwrap())
        };
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("node.toml");
        std::fs::write(
            &file,
            "cores = [2, 5]\ndisks = ['a.img,domain=x', 'mem:1G']\nvolumes = ['v,size=1G,queues=4']\nstate = 's'\n\
             control = 'c.sock'\ncache = '16M'\n",
        )
        .unwrap();
        let file = ["--config", file.to_str().unwrap()];
        let flags = [
            "--cores",
            "2,5",
            "--disk",
            "a.img,domain=x",
            "--disk",
            "mem:1G",
            "--volume",
            "v,size=1G,queues=4",
            "--state",
            "s",
            "--control",
            "c.sock",
            "--cache",
            "16M",
        ];
        assert_eq!(given(&file), given(&flags));
        // Without the cores, and what comes after the state.
        assert_ne!(given(&file), given(&flags[2..10]));
        let wins = given(&[&file[..], &["--cores", "3", "--cache", "8M"]].concat());
        assert!(
            wins.contains("cores: [3]") && wins.contains(&format!("cache_bytes: {}", 8 << 20)),
            "{wins}"
        );
    }

    #[test]
    fn a_volume_is_read_from_one_flag() {
        let spec = parse_volume("bench,size=1G,mirror=2,socket=/run/x.sock,readonly").unwrap();
        assert_eq!(
            (spec.name.as_str(), spec.size, spec.mirror),
            ("bench", Some(1 << 30), Some(2))
        );
        assert_eq!(spec.socket.as_deref(), Some(Path::new("/run/x.sock")));
        assert!(spec.read_only);
    }

    #[test]
    fn a_wrong_volume_flag_says_what_to_use() {
        let error = format!("{:#}", parse_volume("bench,sise=1G").unwrap_err());
        assert!(error.contains("sise") && error.contains("use size"), "{error}");
        assert!(parse_volume("bench,mirror=two").is_err());
        assert!(parse_volume("bench,size=1Q").is_err());
    }
}
