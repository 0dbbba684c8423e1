//! VMs that the program starts.

use std::time::Duration;

use super::common::{Node, Place};

#[test]
fn a_vm_outlives_the_command_that_started_it_and_the_data_plane() {
    let place = Place::new();
    if unibody_vmm_adapter::VmmKind::Qemu
        .adapter(unibody_vmm_adapter::RuntimeRoot::new(place.path("none")))
        .probe()
        .is_err()
        || unibody_vmm_adapter::guest::KERNEL.is_empty()
    {
        eprintln!(
            "SKIPPED a_vm_outlives_the_command_that_started_it_and_the_data_plane: it needs QEMU and gcc"
        );
        return;
    }
    std::fs::write(place.path("guest"), unibody_vmm_adapter::guest::KERNEL).unwrap();
    let (serial, spec) = (place.path("serial"), place.str("vm.toml"));
    std::fs::write(
        &spec,
        format!(
            "name = 'hold'\nmemory = '64M'\nserial_log = '{}'\n[boot]\nkernel = '{}'\ncmdline = 'hold x'\n[[volumes]]\n\
             name = 'root'\nsocket = '{}'\n",
            serial.display(),
            place.str("guest"),
            place.str("v.sock"),
        ),
    )
    .unwrap();
    let (a, state) = (place.disk("a.img", "256M"), place.str("state"));
    let volume = place.volume("v", "size=64M,mirror=1");
    let flags = ["--disk", &a, "--state", &state, "--volume", &volume];
    let node = Node::start(&flags);
    let root = place.str("run");
    let vm = |arguments: &[&str]| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_unibody"))
            .arg("vm")
            .args(arguments)
            .env(unibody_vmm_adapter::RUNTIME_ENV, &root)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success(),
            "{arguments:?}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    };
    let running = || vm(&["list"]).contains("Running");
    let of = |arguments: &[&str]| -> serde_json::Value {
        serde_json::from_str(&vm(&[arguments, &["--json"]].concat())).unwrap()
    };
    vm(&["start", &spec, "--vmm", "qemu"]);
    let end = std::time::Instant::now() + Duration::from_secs(60);
    while unibody_vmm_adapter::guest::verdict(&serial).is_none() {
        assert!(std::time::Instant::now() < end, "the guest says nothing");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(running());
    node.kill();
    assert!(running());
    let node = Node::start(&flags);
    node.wait("the VM's front end is back", |status| {
        status["volumes"][0]["counters"]["connected"] == 1
    });
    assert!(running());
    vm(&["pause", "hold"]);
    assert_eq!(of(&["status", "hold"])["status"]["phase"], "paused");
    vm(&["resume", "hold"]);
    assert_eq!(of(&["status", "hold"])["status"]["phase"], "running");

    // The other VMM gets it as it is now: with the volume that the specification in the file does not have.
    let more = place.str("more.sock");
    node.run(&[
        "volume", "create", "more", "--size", "64M", "--mirror", "1", "--socket", &more,
    ]);
    assert_eq!(of(&["add-volume", "hold", "more", &more])["added"], "more");
    let vmms = of(&["vmms"]);
    let other = vmms
        .as_array()
        .unwrap()
        .iter()
        .find(|vmm| vmm["vmm"] == "cloud-hypervisor");
    if other.unwrap()["error"].is_string() {
        eprintln!(
            "SKIPPED the swap of a VM: it needs Cloud Hypervisor: {}",
            other.unwrap()["error"]
        );
    } else {
        let swapped = of(&["swap", "hold", "--to", "cloud-hypervisor", "--timeout", "1"]);
        assert_eq!(swapped["stopped"], "killed", "this guest ignores the button");
        assert_eq!(of(&["status", "hold"])["vmm"], "cloud-hypervisor");
        node.wait("both volumes are in use", |status| {
            let volumes = status["volumes"].as_array().unwrap();
            volumes.iter().all(|volume| volume["counters"]["connected"] == 1)
        });
    }
    vm(&["kill", "hold"]);
    assert!(!running());
    assert_eq!(node.terminate(), Some(0));
}
