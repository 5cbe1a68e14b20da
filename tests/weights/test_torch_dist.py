"""Stored tensors that several ranks wrote: joined from their pieces, and refused where one is missing."""

import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megamm.errors import CheckpointError
from megamm.weights.torch_dist import StoredTensors, save_torch_dist

PIECES = {"top": torch.arange(6.0).reshape(2, 3), "middle": torch.ones(1, 3), "bottom": torch.zeros(3, 3)}


@pytest.fixture
def write(tmp_path):
    """Those pieces of a tensor `whole`, as the chunks of one checkpoint."""

    def call(*names):
        save_torch_dist(tmp_path, {name: tensor.to("meta") for name, tensor in PIECES.items()}, PIECES.__getitem__)
        metadata = FileSystemReader(tmp_path).read_metadata()
        places = {index.fqn: place for index, place in metadata.storage_data.items()}
        firsts = {"top": 0, "middle": 2, "bottom": 3}
        chunks = [ChunkStorageMetadata(torch.Size((firsts[name], 0)), PIECES[name].shape) for name in names]
        properties = metadata.state_dict_metadata["top"].properties
        metadata.state_dict_metadata = {"whole": TensorStorageMetadata(properties, torch.Size((6, 3)), chunks)}
        metadata.storage_data = {
            MetadataIndex("whole", chunk.offsets): places[name] for name, chunk in zip(names, chunks, strict=True)
        }
        (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
        return StoredTensors(tmp_path)

    return call


def test_pieces_are_joined_in_whatever_order_they_are_listed(write):
    stored = write("middle", "bottom", "top")
    assert stored.infos["whole"].shape == (6, 3)
    assert torch.equal(stored.read("whole"), torch.cat(list(PIECES.values())))


@pytest.mark.parametrize("names", [("top", "bottom"), ("bottom",)])
def test_a_missing_piece_is_seen(names, write):
    with pytest.raises(CheckpointError, match="does not hold all of whole; it is not whole"):
        write(*names).read("whole")
