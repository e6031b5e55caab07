//! The few settings that decide, out of any version of containerd's configuration.

use toml_edit::{DocumentMut, Item, Table, TableLike};

const CRI: &str = "io.containerd.grpc.v1.cri";
const IMAGES: &str = "io.containerd.cri.v1.images";
const TRANSFER: &str = "io.containerd.transfer.v1.local";

/// What the files say together; absent is containerd's default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Settings {
    /// Of the main file: 1, 2, 3 or 4.
    pub(super) root_version: i64,
    pub(super) root: Option<String>,
    /// `grpc.address`
    pub(super) socket: Option<String>,
    pub(super) cri_disabled: bool,
    pub(super) config_path: String,
    pub(super) mirrors: bool,
    /// `configs` or `auths`.
    pub(super) configs: bool,
    pub(super) snapshotter: String,
    pub(super) discard_unpacked_layers: bool,
    pub(super) layer_fetch_buffer: i64,
    use_local_image_pull: bool,
    disable_snapshot_annotations: bool,
    max_concurrent_downloads: i64,
    image_pull_with_sync_fs: bool,
}

impl Settings {
    /// What makes 2.1 and later pull in the CRI plugin instead of the transfer service.
    pub(super) fn forces_local_pull(&self) -> bool {
        self.use_local_image_pull
            || self.discard_unpacked_layers
            || !self.disable_snapshot_annotations
            || self.mirrors
            || self.configs
            || self.max_concurrent_downloads != 3
            || self.image_pull_with_sync_fs
    }

    pub(super) fn config_path_key(&self) -> String {
        let section = if self.root_version < 3 { CRI } else { IMAGES };
        format!("[plugins.\"{section}\".registry] config_path")
    }
}

/// Merges the files, the later over the earlier: by key, or, as 1.x does, by whole plugin section.
pub(super) fn merge(files: &[DocumentMut], by_section: bool) -> Settings {
    let (mut images, mut transfer) = (Table::new(), Table::new());
    let (mut root, mut socket) = (None, None);
    let mut cri_disabled = false;
    for file in files {
        for (section, into) in [(image_section(file), &mut images), (plugin(file, TRANSFER), &mut transfer)] {
            let Some(section) = section else { continue };
            if by_section {
                into.clear();
            }
            overlay(into, &section);
        }
        // An empty text does not override (mergo).
        let text = |item: Option<&Item>| item.and_then(Item::as_str).filter(|text| !text.is_empty()).map(str::to_owned);
        root = text(file.get("root")).or(root);
        let grpc = file.get("grpc").and_then(Item::as_table_like);
        socket = text(grpc.and_then(|grpc| grpc.get("address"))).or(socket);
        let disabled = file.get("disabled_plugins").and_then(Item::as_array);
        let is_cri = |name: &str| matches!(name, "cri" | CRI | IMAGES);
        cri_disabled |= disabled.is_some_and(|names| names.iter().any(|name| name.as_str().is_some_and(is_cri)));
    }
    let registry = |key: &str| images.get("registry").and_then(Item::as_table_like).and_then(|table| table.get(key));
    let has = |key: &str| registry(key).and_then(Item::as_table_like).is_some_and(|table| !table.is_empty());
    let flag = |key: &str, default| images.get(key).and_then(Item::as_bool).unwrap_or(default);
    let number = |table: &Table, key: &str| table.get(key).and_then(Item::as_integer);
    let buffer = "concurrent_layer_fetch_buffer";
    Settings {
        root_version: files.first().map_or(2, version_of),
        root,
        socket,
        cri_disabled,
        config_path: registry("config_path").and_then(Item::as_str).unwrap_or_default().to_owned(),
        mirrors: has("mirrors"),
        configs: has("configs") || has("auths"),
        snapshotter: images.get("snapshotter").and_then(Item::as_str).unwrap_or_default().to_owned(),
        discard_unpacked_layers: flag("discard_unpacked_layers", false),
        layer_fetch_buffer: number(&images, buffer).max(number(&transfer, buffer)).unwrap_or_default(),
        use_local_image_pull: flag("use_local_image_pull", false),
        disable_snapshot_annotations: flag("disable_snapshot_annotations", true),
        max_concurrent_downloads: number(&images, "max_concurrent_downloads").unwrap_or(3),
        image_pull_with_sync_fs: flag("image_pull_with_sync_fs", false),
    }
}

fn version_of(file: &DocumentMut) -> i64 {
    file.get("version").and_then(Item::as_integer).unwrap_or(1)
}

fn plugin(file: &DocumentMut, name: &str) -> Option<Table> {
    file.get("plugins")?.as_table_like()?.get(name)?.clone().into_table().ok()
}

/// The image settings of one file in the layout of version 3, as containerd migrates it.
fn image_section(file: &DocumentMut) -> Option<Table> {
    let images = plugin(file, IMAGES);
    if version_of(file) >= 3 {
        return images;
    }
    let Some(cri) = plugin(file, CRI).or_else(|| plugin(file, "cri")) else { return images };
    let mut migrated = images.unwrap_or_default();
    let mut take = |from: &dyn TableLike, key: &str| {
        if let Some(item) = from.get(key) {
            migrated.insert(key, item.clone());
        }
    };
    if let Some(containerd) = cri.get("containerd").and_then(Item::as_table_like) {
        for key in ["snapshotter", "disable_snapshot_annotations", "discard_unpacked_layers"] {
            take(containerd, key);
        }
    }
    for key in ["registry", "max_concurrent_downloads", "image_pull_with_sync_fs"] {
        take(&cri, key);
    }
    Some(migrated)
}

fn overlay(into: &mut dyn TableLike, over: &dyn TableLike) {
    for (key, item) in over.iter() {
        let both = into.get_mut(key).and_then(Item::as_table_like_mut).zip(item.as_table_like());
        if let Some((into, over)) = both {
            overlay(into, over);
        } else {
            into.insert(key, item.clone());
        }
    }
}
