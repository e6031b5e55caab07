//! Pieces from node to node on this machine's loopback, against nginx serving the same ranges of the
//! same file, and against the stream of libp2p that would be the other way to send them.
//!
//! One client, the one of `client`, asks all of them for one piece after the other on one connection:
//! what is measured is the server. The exchange's own client, which also checks each piece, is a part
//! of its own.

use std::fs::File;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use darter_agent::activity::Activity;
use darter_agent::metrics::Metrics;
use darter_agent::swarm::exchange::{
    Client, Decision, Gate, Identity, Limits, Peers, PieceRequest, Server, Source, Upload, ZoneRelation,
};
use darter_core::Digest;
use darter_core::pieces::{Layout, chaining_value};
use darter_core::swarm::PeerId;
use darter_core::swarm::attest::Attest;
use darter_core::swarm::target::Target;
use darter_core::swarm::token::{self, Secret, Token};
use darter_tests::nginx::Nginx;
use darter_tests::tls::Authority;
use darter_tests::tools::{Need, can_run};
use rustls::crypto::CryptoProvider;
use rustls::crypto::ring::{self, cipher_suite::TLS13_AES_128_GCM_SHA256};
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use rustls_pki_types::ServerName;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::client::{self, Download};
use crate::libp2p_stream::StreamServer;
use crate::{Better, Report, median, megabytes_per_second};

const MIB: u64 = 1 << 20;
/// Half a GiB of a blob whose pieces have 8 MiB, the largest: what images of models have.
const PIECE: u64 = 8 * MIB;
const PIECES: u32 = 64;
const BLOB: u64 = 16 * 1024 * MIB;
/// Alternating, so that a slow minute of the machine hits both sides.
const REPEATS: usize = 9;
const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// The parts, in the order in which they run.
pub const PARTS: [&str; 3] = ["tls", "plain", "fetch"];

/// Runs one of [`PARTS`].
pub async fn run(part: &str, report: &mut Report) -> Result<()> {
    ensure!(can_run("bench-swarm", &[Need::Nginx]), "the benchmark cannot run here");
    let stage = Stage::new()?;
    match part {
        "tls" => over_tls(report, &stage).await,
        "plain" => in_the_clear(report, &stage).await,
        "fetch" => fetched(report, &stage).await,
        other => bail!("no part {other}"),
    }
}

/// The first pieces of a blob in a file, two nodes, and the secret of the one that serves.
struct Stage {
    dir: tempfile::TempDir,
    shelf: Arc<Shelf>,
    server: Identity,
    client: Identity,
    secret: Secret,
}

struct Shelf {
    blob: Digest,
    layout: Layout,
    file: Arc<File>,
    attests: Vec<Attest>,
}

impl Peers for Shelf {
    fn member(&self, _: PeerId) -> Option<ZoneRelation> {
        Some(ZoneRelation::Same)
    }

    fn may_attest(&self, _: PeerId) -> bool {
        true
    }
}

impl Source for Shelf {
    async fn ask(&self, _: PeerId, _: Digest, piece: u32) -> Decision {
        let attest = usize::try_from(piece).ok().and_then(|piece| self.attests.get(piece)).copied();
        if attest.is_none() {
            return Decision::NotHere;
        }
        let span = self.layout.piece(u64::from(piece));
        Decision::Serve(Upload { file: self.file.clone(), span, attest, slot: Box::new(()) })
    }

    async fn values(&self, _: Digest) -> Option<Vec<[u8; 32]>> {
        Some(self.attests.iter().map(|attest| attest.cv).collect())
    }
}

impl Stage {
    fn new() -> Result<Self> {
        let identity = |n| anyhow::Ok(Identity::new(libp2p_identity::Keypair::ed25519_from_bytes([n; 32])?)?);
        let (server, layout, blob) = (identity(1)?, Layout::new(BLOB), Digest::of(b"bench"));
        ensure!(layout.piece_size() == PIECE, "the pieces have another size");
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("blob");
        let mut file = File::create(&path)?;
        let mut attests = Vec::new();
        for piece in 0..PIECES {
            let span = layout.piece(u64::from(piece));
            let bytes: Vec<u8> = (span.start..span.end).map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()[3]).collect();
            file.write_all(&bytes)?;
            attests.push(server.attest(&blob, &layout, piece, chaining_value(span.start, &bytes)));
        }
        let shelf = Shelf { blob, layout, file: Arc::new(File::open(&path)?), attests };
        Ok(Self { dir, shelf: Arc::new(shelf), server, client: identity(2)?, secret: Secret([7; 32]) })
    }

    /// A node that serves the pieces until the guard goes.
    fn serve(&self, gate: Gate) -> Result<(SocketAddr, DropGuard)> {
        let metrics = Arc::new(Metrics::new("bench", "bench"));
        let any = SocketAddr::new(LOCAL, 0);
        let server = Server::bind(any, gate, self.shelf.clone(), Limits::default(), metrics)?;
        let (address, stop) = (server.address()?, CancellationToken::new());
        tokio::spawn(server.run(stop.clone()));
        Ok((address, stop.drop_guard()))
    }

    fn token(&self) -> Result<Token> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        Ok(Token::new(&self.secret, self.client.peer(), &self.shelf.blob, LOCAL, now))
    }

    /// The requests for all pieces, as a node and as nginx understand them.
    fn ours(&self, header: &str) -> Vec<String> {
        let path = |piece| Target { blob: self.shelf.blob, piece };
        (0..PIECES).map(|piece| format!("GET {} HTTP/1.1\r\n{header}", path(piece))).collect()
    }

    fn nginxs(&self) -> Vec<String> {
        let span = |piece| self.shelf.layout.piece(u64::from(piece));
        let range = |piece| format!("Range: bytes={}-{}", span(piece).start, span(piece).end - 1);
        (0..PIECES).map(|piece| format!("GET /blob HTTP/1.1\r\nHost: bench\r\n{}\r\n", range(piece))).collect()
    }
}

/// A server, and what it is asked.
enum Side<'a> {
    /// Over TLS with this configuration, or in the clear.
    Http(SocketAddr, Vec<String>, Option<Arc<ClientConfig>>),
    /// Over a stream of libp2p.
    Stream(&'a StreamServer, Vec<String>),
}

impl Side<'_> {
    /// MB/s of all pieces, by the client off the async threads.
    async fn read(&self) -> Result<f64> {
        let read: Box<dyn FnOnce() -> Result<Download> + Send> = match self {
            Self::Http(address, heads, tls) => {
                let (address, heads, tls) = (*address, heads.clone(), tls.clone());
                Box::new(move || over_http(address, &heads, tls))
            }
            Self::Stream(server, heads) => {
                let (mut stream, heads) = (server.connect().await?, heads.clone());
                Box::new(move || client::pieces(&mut stream, &heads, PIECE))
            }
        };
        let got = tokio::task::spawn_blocking(read).await??;
        Ok(megabytes_per_second(got.bytes, got.took))
    }
}

fn over_http(address: SocketAddr, heads: &[String], tls: Option<Arc<ClientConfig>>) -> Result<Download> {
    let mut socket = TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(Duration::from_secs(60)))?;
    let Some(config) = tls else { return client::pieces(&mut socket, heads, PIECE) };
    let connection = ClientConnection::new(config, ServerName::try_from("localhost")?)?;
    let mut stream = StreamOwned::new(connection, socket);
    stream.conn.complete_io(&mut stream.sock)?;
    client::pieces(&mut stream, heads, PIECE)
}

/// Reads from all in turn and gives the median of each.
async fn in_turn<const N: usize>(sides: [Side<'_>; N]) -> Result<[f64; N]> {
    let mut rates = [const { Vec::new() }; N];
    for _ in 0..REPEATS {
        for (side, rates) in sides.iter().zip(&mut rates) {
            rates.push(side.read().await?);
        }
    }
    Ok(rates.map(median))
}

/// nginx over TLS, and what a client that trusts it is configured with: the cipher suite that nodes use.
async fn nginx_tls(stage: &Stage) -> Result<(Nginx, Arc<ClientConfig>)> {
    let authority = Authority::new()?;
    let (certificate, key) = authority.issue(&["localhost"])?.write(stage.dir.path())?;
    let nginx = Nginx::start_tls(stage.dir.path(), &certificate, &key).await?;
    let provider = CryptoProvider { cipher_suites: vec![TLS13_AES_128_GCM_SHA256], ..ring::default_provider() };
    Ok((nginx, authority.client_config_with(Arc::new(provider))?))
}

async fn over_tls(report: &mut Report, stage: &Stage) -> Result<()> {
    println!("\nover TLS 1.3 with AES-128-GCM: {PIECES} pieces of 8 MiB in a row on one connection");
    let (ours, _stop) = stage.serve(Gate::Tls(stage.server.clone()))?;
    let (nginx, trusting) = nginx_tls(stage).await?;
    let config = Arc::new(stage.client.client_config(stage.server.peer())?);
    let streams = StreamServer::start(stage.shelf.file.clone(), stage.shelf.layout).await?;
    let [theirs, ours, stream] = in_turn([
        Side::Http(nginx.address(), stage.nginxs(), Some(trusting)),
        Side::Http(ours, stage.ours(""), Some(config)),
        Side::Stream(&streams, stage.ours("")),
    ])
    .await?;
    let against = |rate: f64| format!("{rate:.0} against {theirs:.0} MB/s, median of {REPEATS}, same client");
    let name = "pieces over TLS, rate / nginx";
    report.add(name, ours / theirs, "ratio", Better::Higher, Some(1.2), against(ours));
    let name = "pieces over a libp2p stream, rate / nginx TLS";
    let conditions = format!("{}; TCP, noise, yamux", against(stream));
    report.add(name, stream / theirs, "ratio", Better::Higher, None, conditions);
    Ok(())
}

async fn in_the_clear(report: &mut Report, stage: &Stage) -> Result<()> {
    println!("\nin the clear, nginx with sendfile: {PIECES} pieces of 8 MiB in a row on one connection");
    let (ours, _stop) = stage.serve(Gate::Token(stage.secret.clone()))?;
    let nginx = Nginx::start(stage.dir.path(), "").await?;
    let header = format!("{}: {}\r\n", token::HEADER, stage.token()?);
    let [theirs, ours] =
        in_turn([Side::Http(nginx.address(), stage.nginxs(), None), Side::Http(ours, stage.ours(&header), None)])
            .await?;
    let conditions = format!("{ours:.0} against {theirs:.0} MB/s, median of {REPEATS}, same client");
    report.add("pieces in the clear, rate / nginx", ours / theirs, "ratio", Better::Higher, Some(0.9), conditions);
    Ok(())
}

/// What a node really does: two pieces at once of one peer, each with its BLAKE3 and its signature.
async fn fetched(report: &mut Report, stage: &Stage) -> Result<()> {
    println!("\nnode to node, two pieces at once, BLAKE3 and signature of each checked, on the same cores");
    for (name, gate, identity) in [
        ("over TLS", Gate::Tls(stage.server.clone()), Some(stage.client.clone())),
        ("in the clear", Gate::Token(stage.secret.clone()), None),
    ] {
        let (address, _stop) = stage.serve(gate)?;
        let metrics = Arc::new(Metrics::new("bench", "bench"));
        let client = Arc::new(Client::new(identity, stage.shelf.clone(), Limits::default(), metrics));
        let mut rates = Vec::new();
        for _ in 0..REPEATS {
            let token = Some(stage.token()?);
            let started = Instant::now();
            let halves: Vec<_> = [0, 1]
                .map(|half| {
                    let (client, peer, shelf) = (client.clone(), stage.server.peer(), stage.shelf.clone());
                    tokio::spawn(async move {
                        for piece in (half..PIECES).step_by(2) {
                            let (blob, layout, patience) = (shelf.blob, shelf.layout, Duration::from_secs(10));
                            let known = None;
                            let request = PieceRequest {
                                peer,
                                address,
                                blob,
                                layout,
                                piece,
                                known,
                                token,
                                patience,
                                activity: Activity::default(),
                            };
                            client.fetch(&request).await?;
                        }
                        anyhow::Ok(())
                    })
                })
                .into();
            for half in halves {
                half.await??;
            }
            rates.push(megabytes_per_second(u64::from(PIECES) * PIECE, started.elapsed()));
        }
        let name = format!("fetched and checked {name}, MB/s");
        report.add(&name, median(rates), "MB/s", Better::Higher, None, format!("median of {REPEATS}"));
    }
    Ok(())
}
