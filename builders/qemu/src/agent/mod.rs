//! stand-in
use async_trait::async_trait;
use kiln_model::Result;
use kiln_model::guest::{Command, Exit, Guest, OnLine, SshAccess};
use kiln_model::tree::Tree;
use kiln_ssh::SshGuest;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
pub(crate) const PORT: &str = "org.kiln.agent";
pub(crate) const BINARY: Option<&[u8]> = None;
pub(crate) struct Refresh {
    pub(crate) seed: [u8; 512],
    pub(crate) now: SystemTime,
    pub(crate) files: Vec<(String, u32, Vec<u8>)>,
}
pub(crate) struct Agent;
impl Agent {
    pub(crate) async fn quiesce(&self) -> Result<()> {
        Ok(())
    }
    pub(crate) async fn thaw(&self) -> Result<()> {
        Ok(())
    }
}
pub(crate) struct AgentGuest(Arc<SshGuest>);
impl AgentGuest {
    pub(crate) fn agent(&self) -> Option<Agent> {
        None
    }
}
pub(crate) async fn bring(_: Option<UnixStream>, _: &Arc<SshGuest>) -> Result<Option<Arc<AgentGuest>>> {
    Ok(None)
}
pub(crate) async fn wake(_: UnixStream, ssh: &Arc<SshGuest>, _: Refresh, _: Duration) -> Result<Arc<AgentGuest>> {
    Ok(Arc::new(AgentGuest(ssh.clone())))
}
#[async_trait]
impl Guest for AgentGuest {
    async fn execute(&self, command: &Command, on_line: OnLine<'_>) -> Result<Exit> {
        self.0.execute(command, on_line).await
    }
    async fn upload(&self, tree: &Tree, destination: &str) -> Result<()> {
        self.0.upload(tree, destination).await
    }
    async fn download(&self, source: &str, destination: &Path) -> Result<()> {
        self.0.download(source, destination).await
    }
    async fn wait_for_new_boot(&self, boot_id: &str, deadline: Duration) -> Result<()> {
        self.0.wait_for_new_boot(boot_id, deadline).await
    }
    fn ssh_access(&self) -> Option<SshAccess> {
        self.0.ssh_access()
    }
}
