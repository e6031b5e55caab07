//! The harness: what tests, the demo and the benchmarks start, and what they look at.
//!
//! It fakes the wire and never a module: real sockets, a real containerd in a network namespace, a
//! real docker-registry, and where the real thing cannot be had (ECR) a server that behaves like it.
//! Everything that is started here ends with its owner, also when the test is killed, and any number
//! of runs can go on at once on one machine.
//!
//! - where things run: [`net`], [`process`], [`scratch`], [`tmpfs`], [`tools`]
//! - what is pulled: [`image`], [`tls`], [`http`]
//! - whence: [`registry`] (docker-registry), [`nginx`], [`fake_ecr`], [`imds`], both on [`wire`]
//! - for whom nodes are members of a cluster: [`kubernetes`], asked by [`api`], with [`controllers`], behind a [`gate`];
//!   installed there: [`chart`]; whether it may be: [`kubeconform`]
//! - and what scales there: [`karpenter`], [`keda_operator`], which asks [`external_scaler`]; on nodes whose
//!   [`kubelets`] are played; all of it together: [`kube_cluster`]
//! - by whom: [`containerd`] with [`cri`], [`emulator`], [`conformance`]
//! - on which GPUs: [`nvml`]; and who hears how they are: [`reports`], or the real [`scaler`], which [`keda`] asks
//! - through what: [`agent`]; over what: [`proxy`]; all of it together: [`stage`], and many nodes at
//!   once: [`cluster`]
//! - and what is made from a description: [`proto`]

pub mod agent;
pub mod api;
pub mod chart;
pub mod cluster;
pub mod conformance;
pub mod containerd;
pub mod controllers;
pub mod cri;
pub mod emulator;
pub mod external_scaler;
pub mod fake_ecr;
pub mod gate;
pub mod http;
pub mod image;
pub mod imds;
pub mod karpenter;
pub mod keda;
pub mod keda_operator;
pub mod kube_cluster;
pub mod kubeconform;
pub mod kubelet;
pub mod kubelets;
pub mod kubernetes;
pub mod net;
pub mod nginx;
pub mod nvml;
pub mod process;
pub mod prometheus;
pub mod proto;
pub mod proxy;
pub mod registry;
pub mod reports;
pub mod scaler;
pub mod scratch;
pub mod stage;
pub mod tls;
pub mod tmpfs;
pub mod tools;
pub mod wire;
