//! How vhost-user sessions reach the data plane: a device is a volume, named by the volume's index.

use std::sync::Arc;

use unibody_dataplane::frontend::{self, DeviceId, Queue};
use unibody_dataplane::plane::{Plane, QueueKey, VolumeIndex};

/// See the module.
pub(crate) struct Sessions(pub(crate) Arc<Plane>);

/// The device of a volume.
pub(crate) fn device(volume: VolumeIndex) -> DeviceId {
    DeviceId(u32::from(volume.0))
}

fn volume(device: DeviceId) -> VolumeIndex {
    VolumeIndex(device.0 as u16)
}

impl frontend::Plane for Sessions {
    fn start_queue(&self, device: DeviceId, index: u16, queue: Queue) {
        self.0.start_queue(QueueKey { device: device.0, index }, volume(device), Box::new(queue));
    }

    fn stop_queue(&self, device: DeviceId, index: u16) -> Option<Queue> {
        self.0.stop_queue(QueueKey { device: device.0, index }, volume(device)).map(|queue| *queue)
    }

    fn report(&self, device: DeviceId, message: &str) {
        eprintln!("unibody: volume {}: {message}", device.0);
    }
}
