//! Machines of a network of their own, as far as a node can tell: network namespaces on a common bridge, each with an address.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// See the module. Nothing of it is left at the end.
pub(crate) struct Net {
    name: String,
    machines: usize,
}

fn tried(command: &str) -> Result<(), String> {
    let words: Vec<&str> = command.split(' ').collect();
    let output = Command::new(words[0]).args(&words[1..]).output();
    let output = output.map_err(|error| format!("{command}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{command}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

impl Net {
    /// Makes one with so many machines; `None`, said aloud, where this is not allowed or `ip` and `nft` are missing.
    pub(crate) fn new(test: &str, machines: usize) -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let net = Net {
            name: format!("ub{}-{number}", std::process::id()),
            machines,
        };
        match net.make() {
            Ok(()) => Some(net),
            Err(error) => {
                eprintln!("SKIPPED {test}: it needs root, iproute2 and nftables: {error}");
                None
            }
        }
    }

    fn make(&self) -> Result<(), String> {
        let middle = self.space(0);
        tried(&format!("ip netns add {middle}"))?;
        tried(&format!("ip -n {middle} link add name hub type bridge"))?;
        tried(&format!("ip -n {middle} link set dev hub up"))?;
        for machine in 1..=self.machines {
            let space = self.space(machine);
            tried(&format!("ip netns add {space}"))?;
            tried(&format!(
                "ip -n {space} link add name eth0 type veth peer name p{machine} netns {middle}"
            ))?;
            tried(&format!("ip -n {middle} link set dev p{machine} master hub up"))?;
            tried(&format!(
                "ip -n {space} addr add {}/24 dev eth0",
                address(machine)
            ))?;
            tried(&format!("ip -n {space} link set dev eth0 up"))?;
            tried(&format!("ip -n {space} link set dev lo up"))?;
            let nft = format!("ip netns exec {space} nft");
            tried(&format!("{nft} add table inet cut"))?;
            tried(&format!(
                "{nft} add chain inet cut in {{ type filter hook input priority 0 ; }}"
            ))?;
        }
        Ok(())
    }

    /// Name of a machine's namespace.
    pub(crate) fn space(&self, machine: usize) -> String {
        format!("{}-{machine}", self.name)
    }

    /// From now on nothing that one machine sends reaches another.
    pub(crate) fn cut(&self, from: usize, to: usize) {
        let nft = format!("ip netns exec {} nft", self.space(to));
        tried(&format!(
            "{nft} add rule inet cut in ip saddr {} drop",
            address(from)
        ))
        .unwrap();
    }

    /// Everything reaches everybody again.
    pub(crate) fn mend(&self) {
        for machine in 1..=self.machines {
            tried(&format!(
                "ip netns exec {} nft flush chain inet cut in",
                self.space(machine)
            ))
            .unwrap();
        }
    }
}

/// Where a machine is.
pub(crate) fn address(machine: usize) -> String {
    format!("10.77.0.{machine}")
}

impl Drop for Net {
    fn drop(&mut self) {
        for machine in 0..=self.machines {
            // It may not have come so far.
            tried(&format!("ip netns del {}", self.space(machine))).ok();
        }
    }
}
