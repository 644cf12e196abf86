//! What the mesh looks like, for whoever asks: until the gossip port drives the machine of membership, nothing.

/// Asks the task that owns the machine. Cloneable.
#[derive(Clone, Debug, Default)]
pub(crate) struct MeshHandle;

impl MeshHandle {
    /// What the machine says; `None`: it has ended.
    #[expect(clippy::unused_async, reason = "the machine is another task's")]
    pub(crate) async fn status(&self) -> Option<membership::Status> {
        Some(membership::Status::default())
    }
}
