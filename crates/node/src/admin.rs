//! The admin port: what operators ask a node. On loopback it speaks without TLS; on any other address it lets in only who
//! shows a certificate of the mesh with the role operator.

mod mesh;

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base::{ZoneName, clock};
use identity::{CertificateSummary, IdentityError};
use membership::PROTOCOL_VERSION;
use proto::isobar::admin::v1::{
    Certificate, GetIdentityReply, GetIdentityRequest, GetMeshReply, GetMeshRequest, Own,
    admin_server::{self, AdminServer},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, service::Routes};
use transport::{Limits, Listener, QuicKeys, Server, ServerTls, Worker};

use crate::{
    arrivals::Arrivals,
    engines::Engine,
    gossip::MeshHandle,
    peers::Board,
    renewal::Renewals,
    trust::{Gate, Port, Trust},
};

/// The number under which it serves: no worker has it.
const SERVING: u8 = 0xfd;
/// Operators are few.
const CONNECTIONS: usize = 64;

/// What the port answers from. Cloneable.
#[derive(Clone, Debug)]
pub(crate) struct Admin {
    pub(crate) trust: Arc<Trust>,
    pub(crate) renewals: Arc<Renewals>,
    pub(crate) is_authority: bool,
    pub(crate) mesh: MeshHandle,
    pub(crate) place: Place,
    pub(crate) engines: Arc<[Arc<Engine>]>,
    pub(crate) board: Arc<Board>,
    pub(crate) arrivals: Arc<Arrivals>,
}

/// Where and what the node is, as its certificate does not say.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) zone: Option<ZoneName>,
    /// The process: greater after each start.
    pub(crate) epoch: u64,
    pub(crate) draining: CancellationToken,
}

impl Admin {
    /// Serves until `stop`.
    pub(crate) async fn serve(self, mut listener: Listener, stop: CancellationToken) {
        let address = listener.address();
        let Some(port) = listener.port(0) else { return };
        let worker = Worker::new(SERVING, 1, stop.clone(), stop);
        let serving = async {
            let server = self.server(address).map_err(io::Error::other)?;
            let accepting = listener.accept(worker.drain.clone());
            tokio::try_join!(server.serve(worker.clone(), port), accepting).map(drop)
        };
        if let Err(error) = serving.await {
            tracing::error!(%error, "the admin port serves no more");
        }
        worker.tasks.close();
        drop(tokio::time::timeout(Duration::from_secs(1), worker.tasks.wait()).await);
    }

    fn server(self, address: SocketAddr) -> Result<Server<Routes>, IdentityError> {
        let trust = self.trust.clone();
        let tls = if address.ip().is_loopback() {
            ServerTls::Plaintext
        } else {
            ServerTls::Tls(Box::new(trust.identity().operator_server_config(&[])?))
        };
        let limits = Limits { connections: CONNECTIONS, ..Limits::clients() };
        let gate = Gate { trust, port: Port::Admin };
        Ok(Server::new(limits, tls, QuicKeys::random(), self.routes(), 0)
            .with_lessor(Arc::new(gate)))
    }

    fn routes(self) -> Routes {
        let mut routes = Routes::new(AdminServer::new(self));
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
                .with_service_name(admin_server::SERVICE_NAME)
                .include_reflection_service(false)
        };
        // A port without reflection is better than none; its declarations are our own.
        if let (Ok(v1), Ok(v1alpha)) = (reflection().build_v1(), reflection().build_v1alpha()) {
            routes = routes.add_service(v1).add_service(v1alpha);
        }
        routes
    }

    /// The node itself.
    fn own(&self) -> Own {
        let identity = self.trust.identity();
        let (id, place) = (identity.id(), &self.place);
        let loads: Vec<_> = self.engines.iter().map(|engine| engine.load()).collect();
        Own {
            id: id.to_string(),
            node: id.name.to_string(),
            region: id.region.to_string(),
            zone: place.zone.as_ref().map(ToString::to_string).unwrap_or_default(),
            epoch: place.epoch,
            release: env!("CARGO_PKG_VERSION").to_owned(),
            protocol: PROTOCOL_VERSION,
            is_draining: place.draining.is_cancelled(),
            is_relay: false,
            certificate: Some(certificate(identity.current().certificate())),
            load: Some(mesh::load(&loads)),
        }
    }
}

#[tonic::async_trait]
impl admin_server::Admin for Admin {
    async fn get_identity(
        &self,
        _: Request<GetIdentityRequest>,
    ) -> Result<Response<GetIdentityReply>, Status> {
        let identity = self.trust.identity();
        let current = identity.current();
        let revocations = identity.revocations();
        let failing = self.renewals.failing.lock().clone();
        let roots = current.trusted().iter();
        Ok(Response::new(GetIdentityReply {
            id: identity.id().to_string(),
            current: Some(certificate(current.certificate())),
            served: identity.served().as_ref().map(certificate),
            root_sha256: roots.map(identity::hex_fingerprint).collect(),
            renewal_due_s: self.renewals.due.lock().map(seconds).unwrap_or_default(),
            renewal_error: failing.as_ref().map(|f| f.why.clone()).unwrap_or_default(),
            renewal_failing_since_s: failing.map(|f| seconds(f.since)).unwrap_or_default(),
            revocations_version: revocations.version(),
            revoked: revocations.entries().map(|(id, _)| id.to_string()).collect(),
            mesh_connections: u32::try_from(self.trust.connections()).unwrap_or(u32::MAX),
            is_authority: self.is_authority,
        }))
    }

    async fn get_mesh(&self, _: Request<GetMeshRequest>) -> Result<Response<GetMeshReply>, Status> {
        let status = self.mesh.status().await.ok_or_else(|| {
            Status::unavailable(
                "its gossip port does not answer: the node stops, or its processors are at their limit; \
                 ask again, or another",
            )
        })?;
        let loads = self.board.loads_by_peer().into_iter();
        let known = mesh::Known {
            own: self.own(),
            loads: loads.map(|(peer, loads)| ((peer.region, peer.node), loads)).collect(),
            attempts: self.arrivals.arrivals(),
            views: self.board.region_views(),
        };
        Ok(Response::new(mesh::reply(&status, known, clock::now())))
    }
}

fn certificate(summary: &CertificateSummary) -> Certificate {
    Certificate {
        serial: summary.serial.clone(),
        not_before_s: seconds(summary.from),
        not_after_s: seconds(summary.until),
    }
}

fn seconds(moment: SystemTime) -> u64 {
    moment.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
